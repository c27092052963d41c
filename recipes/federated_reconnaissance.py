"""Up to 600 new characters, met one by one by many clients.  Hendryx et al. 2021, "Federated reconnaissance".

Claim    Running prototypes, merged from any clients without a rounding error, keep more of 600 classes than a net that
         is fine-tuned as they arrive, with or without replay (derived from the abstract: about 86 %; ANML 63.8 %).
Run      python recipes/federated_reconnaissance.py --data FOLDER --out runs/federated       (FOLDER: omniglot.npz)
         python recipes/federated_reconnaissance.py --download --out runs/federated
Smoke    python recipes/federated_reconnaissance.py --data FOLDER --smoke --out runs/federated
Bound    The upper bound is a joint ProtoNet: its encoder goes on training on the rows to learn from of all classes.
         A net that is fine-tuned on all these rows at once is shown beside it; it is none, as it is below ProtoNet.
Differs  792 of the 964 background characters train (the others are for validation), with turned ones as classes;
         group normalization; minutes of training. Rows are embedded once, whoever holds them. Replay keeps every row.
         Fine-tuned nets start from an encoder that was trained to tell background classes apart, or from ProtoNet's.
"""

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl import Omniglot, ProtoNet, TaskSpec, TrainConfig, meta_train
from metaicl.episode import Episode, Examples
from metaicl.incremental import IncrementalCurve, incremental_accuracy, plot_curves, rows_by_class
from metaicl.nets.backbones import Conv4, encoder_dim
from metaicl.objectives import query_loss
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.task import derive_generator

sys.path.insert(0, str(Path(__file__).parent))
from peers.fine_tuned import FineTuned

N_LEARN, N_TEST = 15, 5
JOINT, AT_ONCE = "joint ProtoNet", "SGD on all rows at once"
TUNED = ("SGD", "SGD with replay", "SGD with replay from the ProtoNet's encoder")


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {
        "steps": 2, "seeds": 1, "channels": 8, "checkpoints": (10, 20), "round_steps": 1, "joint_steps": 2,
    }  # fmt: skip

    data: str = option("", "folder with omniglot.npz")
    download: bool = option(False, "fetch the public originals instead")
    steps: int = option(1200, "updates of each encoder, 120 images each")
    channels: int = option(64, "filters of Conv4")
    seeds: int = option(3, "encoders, each with its own order of the stream")
    checkpoints: tuple[int, ...] = option((10, 50, 100, 200, 300, 400, 500, 600), "numbers of classes seen")
    clients: tuple[int, ...] = option((1, 5, 20), "numbers of clients")
    round_steps: int = option(30, "fine-tuning updates for every 10 classes that arrive")
    joint_steps: int = option(1200, "updates of the net and of the joint ProtoNet on all rows at once")
    tuning_lr: float = option(0.01, "learning rate of the fine-tuning (SGD, momentum 0.9)")


def meta_trained(config: Config, seed: int) -> nn.Module:
    """The encoder of a ProtoNet: 30-way, 2 shots, 2 queries."""
    tasks = Omniglot(n_way=30, split="lake", folder=config.data or None, download=config.download)
    torch.manual_seed(seed)
    learner = ProtoNet(tasks.spec, encoder=Conv4(channels=config.channels))
    train = TrainConfig(
        steps=config.steps, outer_lr=2e-3, schedule="cosine", meta_batch_size=1, n_shot=2, n_query=2, seed=seed,
        validate_every=None,
    )  # fmt: skip
    meta_train(learner, tasks, train, progress=False)
    return learner.encoder


def joint_encoder(config: Config, start: nn.Module, train: Tensor, seed: int) -> nn.Module:
    """A ProtoNet's encoder after 30-way episodes of the stream's own classes, from the rows to learn from."""
    spec = TaskSpec("classification", tuple(train.shape[2:]), "image", n_way=30)
    learner = ProtoNet(spec, encoder=copy.deepcopy(start)).train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.joint_steps)
    generator, ways = derive_generator(seed, "joint"), min(30, len(train))
    y = torch.arange(ways).repeat_interleave(2)[None]
    for _ in range(config.joint_steps):
        classes = torch.randperm(len(train), generator=generator)[:ways]
        picked = torch.rand(ways, train.shape[1], generator=generator).argsort(1)[:, :4]
        rows = train[classes[:, None], picked]
        support, query = (part.flatten(0, 1)[None] for part in (rows[:, :2], rows[:, 2:]))
        optimizer.zero_grad()
        query_loss(learner, Episode(Examples(support, y), Examples(query, y))).mean().backward()
        optimizer.step()
        schedule.step()
    return learner.encoder.eval()


def classifier(config: Config, seed: int) -> nn.Module:
    """The encoder of a net that tells all upright background classes apart, trained on as many images."""
    tasks = Omniglot(split="lake", rotations=False, folder=config.data or None, download=config.download)
    torch.manual_seed(seed)
    encoder = Conv4(channels=config.channels)
    owned, labels = tasks.class_splits["train"], tasks.source_classes
    assert labels is not None
    net = nn.Sequential(encoder, nn.Linear(encoder_dim(encoder, tasks.spec), len(owned)))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    ids = torch.isin(labels, owned).nonzero()[:, 0]
    for _ in range(config.steps):
        batch = ids[torch.randint(len(ids), (120,))]
        optimizer.zero_grad()
        F.cross_entropy(net(tasks.rows(batch)), torch.searchsorted(owned, labels[batch])).backward()
        optimizer.step()
        schedule.step()
    return encoder


def curves(config: Config, images: Tensor, seed: int) -> tuple[dict[str, IncrementalCurve], int]:
    """Every learner on one order of the stream, and how many numbers differ between merged and central prototypes."""
    train, test = images[:, :N_LEARN], images[:, N_LEARN:]
    last, found = config.checkpoints[-1], {}
    stream: dict[str, Any] = {"orders": [seed], "checkpoints": config.checkpoints}
    encoder = meta_trained(config, seed).eval()
    with torch.no_grad():
        embedded = torch.stack([encoder(rows) for rows in images])
    proto = ProtoNet(TaskSpec("classification", tuple(embedded.shape[2:]), n_way=2), encoder=nn.Identity())
    for n in config.clients:
        found[f"ProtoNet, {n} clients"] = incremental_accuracy(
            proto, embedded[:, :N_LEARN], embedded[:, N_LEARN:], n_clients=n, **stream
        )
    labels = torch.arange(len(images)).repeat_interleave(N_LEARN)[None]
    rows = Examples(embedded[:, :N_LEARN].flatten(0, 1)[None], labels)
    owner = torch.randint(20, (rows.n_rows,), generator=derive_generator(seed, "owners"))
    central = ProtoNet(proto.spec.with_n_way(len(images)), encoder=nn.Identity())
    parts = [central.adapt(rows.rows((owner == client).nonzero()[:, 0])) for client in range(20)]
    differing = int((central.merge(parts).means() != central.adapt(rows).means()).sum())
    spec = TaskSpec("classification", tuple(images.shape[2:]), "image", n_way=last)
    starts = (classifier(config, seed).eval(), encoder)
    for name, start, replay in zip(TUNED, (starts[0], *starts), (False, True, True), strict=True):
        learner = FineTuned(spec, encoder=start, steps=config.round_steps, lr=config.tuning_lr, replay=replay)
        found[name] = incremental_accuracy(learner, train, test, classes_per_round=10, **stream)
    joint = FineTuned(spec, encoder=starts[0], steps=config.joint_steps, lr=config.tuning_lr, replay=False)
    stream["checkpoints"] = (last,)
    found[AT_ONCE] = incremental_accuracy(joint, train, test, classes_per_round=last, **stream)
    order = torch.randperm(len(images), generator=derive_generator(seed, "stream of classes"))[:last]
    bound = joint_encoder(config, encoder, train[order], seed)
    with torch.no_grad():
        embedded = torch.stack([bound(rows) for rows in images])
    found[JOINT] = incremental_accuracy(proto, embedded[:, :N_LEARN], embedded[:, N_LEARN:], **stream)
    return found, differing


def main(config: Config) -> RecipeResult:
    """Train the encoders, stream, decide."""
    tune_process()
    tasks = Omniglot(split="lake", rotations=False, folder=config.data or None, download=config.download)
    runs: list[tuple[dict[str, IncrementalCurve], int]] = []
    for seed in range(config.seed, config.seed + config.seeds):
        images = rows_by_class(tasks, split="test", n_rows=N_LEARN + N_TEST, seed=seed)
        runs.append(curves(config, images, seed))
    accuracy = {name: np.concatenate([curve[name].accuracy for curve, _ in runs]) for name in runs[0][0]}
    found = {name: replace(one, accuracy=accuracy[name]) for name, one in runs[0][0].items()}
    for name, curve in found.items():
        for n in curve.checkpoints:
            print(f"{name:44s} {n:4d} classes  {curve.interval(n).mean:.4f}  {curve.interval(n).ends}", flush=True)
    shown = [f"ProtoNet, {config.clients[-1]} clients", *TUNED, AT_ONCE, JOINT]
    plot_curves({name: found[name] for name in shown}).savefig(config.out / "curve.png", dpi=150)
    last, same = config.checkpoints[-1], [found[f"ProtoNet, {n} clients"] for n in config.clients]
    proto, ours = same[0], same[0].interval(last)
    spread = max(float(np.abs(one.accuracy - proto.accuracy).max()) for one in same)
    criteria = [
        Criterion("numbers that differ, merged or central", sum(n for _, n in runs), "<=", 0, reference=0),
        Criterion(f"accuracy, largest difference between {config.clients} clients", spread, "<=", 0, reference=0),
        Criterion(f"ProtoNet, accuracy over {last} classes", ours.mean, ">=", 0.638, ci=ours.ends, reference=0.86),
    ]
    for name in TUNED:
        gap = proto.difference(found[name], last)
        criteria.append(Criterion(f"ProtoNet - {name}, over {last} classes", gap.mean, ">", 0, ci=gap.ends))
    gap = found[AT_ONCE].difference(found["SGD with replay"], last)
    criteria.append(Criterion(f"{AT_ONCE} - with replay", gap.mean, ">", 0, ci=gap.ends))
    gap = found[JOINT].difference(proto, last)
    criteria.append(Criterion(f"{JOINT} - ProtoNet: an upper bound", gap.mean, ">", 0, ci=gap.ends))
    claim = f"ProtoNet streams {last} classes from many clients without a rounding error, and beats fine-tuning."
    return RecipeResult("federated_reconnaissance", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
