"""What training in bfloat16 costs in accuracy, in seconds: an MLP on images that are embedded once."""

import torch

from metaicl import Omniglot, ProtoNet, TrainConfig, evaluate, meta_train
from metaicl.nets.backbones import Conv4
from metaicl.statistics import Interval, interval, paired
from metaicl.task import Split
from metaicl.tasks import tasks_from_arrays

CLASSES: dict[Split, int] = {"train": 100, "validation": 20, "test": 60}


def lost_in_bf16(tasks: Omniglot, *, steps: int, channels: int, seed: int, n_episodes: int = 200) -> Interval:
    """Accuracy in float32 minus accuracy in bfloat16 after the same updates, 20-way 1-shot, on the same episodes.

    Args:
        tasks: Characters; some of each split are taken.
        steps: Updates of a ProtoNet with an MLP, the same in both.
        channels: Filters of the Conv4 that embeds the images and stays as it is drawn.
        seed: Of the draws.
        n_episodes: Meta-test episodes.
    """
    labels = tasks.source_classes
    assert labels is not None  # every ClassEpisodes has them
    owned = {split: tasks.class_splits[split][:n] for split, n in CLASSES.items()}
    ids = torch.isin(labels, torch.cat(list(owned.values()))).nonzero()[:, 0]
    torch.manual_seed(seed)
    encoder = Conv4(channels=channels).eval()
    with torch.no_grad():
        embedded = torch.cat([encoder(tasks.rows(part)) for part in ids.split(500)])
    vectors = tasks_from_arrays(embedded, labels[ids], n_way=20, class_splits=owned)  # type: ignore[arg-type]
    accuracies = []
    for autocast in (None, "bf16"):
        torch.manual_seed(seed)
        learner = ProtoNet(vectors.spec)
        plan = TrainConfig(
            steps=steps, n_shot=1, n_query=5, meta_batch_size=4, autocast=autocast, validate_every=None, seed=seed
        )
        meta_train(learner, vectors, plan, progress=False)
        found = evaluate(learner, vectors, n_shot=1, n_query=5, n_episodes=n_episodes)
        print(f"ProtoNet after {steps} updates in {autocast or 'float32'}: accuracy {found.mean('accuracy'):.4f}")
        accuracies.append(found.metrics["accuracy"][None])
    return interval(paired(*accuracies))
