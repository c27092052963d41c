"""Omniglot with one encoder and every head: what does the head contribute?

Claim    ProtoNet (Conv4-64) reaches 94 % at 20-way 1-shot within 15 CPU minutes of training (96.0 % in Snell et al.
         2017, arXiv:1703.05175). Heads with the same encoder, episodes and number of updates are compared with it
         episode by episode, and on the trials within one alphabet (published ProtoNet: 13.7 % errors; people: 4.5 %).
Run      python recipes/omniglot_heads.py --data FOLDER --out runs/omniglot_heads        (FOLDER holds omniglot.npz)
Smoke    python recipes/omniglot_heads.py --data FOLDER --smoke --out runs/omniglot_heads
Method   trained on 60-way episodes, judged in learners built for 5 and 20 ways; once more on the alphabets without
         trials, for these; 25 % errors there is a guessed bound. Finished runs stay in --out. Learned temperatures.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from metaicl import Learner, Omniglot, TrainConfig, meta_train
from metaicl.evaluation import evaluate_shots
from metaicl.files import atomic_write
from metaicl.process import tune_process
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.statistics import Array, family_intervals, intervals, paired

sys.path.insert(0, str(Path(__file__).parent))
from peers.metric_heads import HEADS

WAYS, SHOTS = (5, 20), (1, 5)
TRIALS = "Lake trials"


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 1, "seeds": 1, "n_episodes": 1, "processes": 1, "heads": ("ProtoNet", "FEAT")}

    data: str = option("", "folder with omniglot.npz")
    download: bool = option(False, "fetch the public originals instead")
    heads: tuple[str, ...] = option(tuple(HEADS), "which heads; ProtoNet is always among them")
    steps: int = option(1000, "updates of each head and seed")
    train_ways: int = option(60, "classes of a training episode")
    seeds: int = option(3, "training seeds")
    trial_seeds: int = option(1, "training seeds for the trials within one alphabet; 0 leaves them out")
    n_episodes: int = option(600, "meta-test episodes")
    processes: int = option(2, "runs at a time, one thread each")


@dataclass(frozen=True)
class Job:
    """One head, one split of the characters, one seed."""

    head: str
    split: str
    seed: int
    config: Config

    @property
    def path(self) -> Path:
        """Where its accuracies go; settings are part of the name, so that others do not find them."""
        c = self.config
        settings = f"{c.train_ways}way-{c.steps}steps-{c.n_episodes}episodes"
        return c.out / "runs" / f"{self.head}-{self.split}-seed{self.seed}-{settings}.json".replace(" ", "_")


def omniglot(job: Job, n_way: int) -> Omniglot:
    """The tasks of a job."""
    return Omniglot(n_way=n_way, split=job.split, folder=job.config.data or None, download=job.config.download)


def trained(job: Job) -> tuple[Learner, float]:
    """The head after its training, and the CPU minutes of that."""
    tasks = omniglot(job, job.config.train_ways)
    torch.manual_seed(job.seed)
    learner = HEADS[job.head](tasks.spec)
    config = TrainConfig(
        steps=job.config.steps, outer_lr=2e-3, schedule="cosine", meta_batch_size=1, n_shot=1, n_query=3,
        warmup_steps=min(20, job.config.steps - 1), validate_every=None, select="last", seed=job.seed,
    )  # fmt: skip
    began = time.process_time()
    meta_train(learner, tasks, config, progress=False)
    return learner, (time.process_time() - began) / 60


def finish(job: Job) -> dict[str, Any]:
    """Train and judge, unless that was done: CPU minutes, and accuracies of each episode by setting."""
    if job.path.is_file():
        return json.loads(job.path.read_text())
    tune_process(threads=1)
    learner, minutes = trained(job)
    found: dict[str, Any] = {"CPU minutes": minutes}
    for n_way in (20,) if job.split == "lake" else WAYS:
        tasks = omniglot(job, n_way)
        judged = HEADS[job.head](tasks.spec)
        judged.load_state_dict(learner.state_dict())
        if job.split == "lake":
            found[TRIALS] = trial_accuracies(judged, tasks)
            continue
        for n_shot, one in evaluate_shots(
            judged, tasks, shots=SHOTS, n_query=5, n_episodes=job.config.n_episodes, batch_size=5
        ).items():
            found[f"{n_way}-way {n_shot}-shot"] = one.metrics["accuracy"].tolist()
    job.path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(job.path, json.dumps(found).encode())
    return found


def trial_accuracies(learner: Learner, tasks: Omniglot) -> list[float]:
    """Accuracy in each of the twenty original runs."""
    episode = tasks.lake_trials()
    with torch.no_grad():
        answer = learner.eval()(episode.support, episode.query.x)
    assert isinstance(answer, torch.distributions.Categorical)
    return (answer.logits.argmax(-1) == episode.query.y).double().mean(1).tolist()


def main(config: Config) -> RecipeResult:
    """Run all jobs, compare with ProtoNet on the same episodes, and write the table."""
    heads = list(dict.fromkeys(("ProtoNet", *config.heads)))
    numbers = {"vinyals": range(config.seeds), "lake": range(min(config.trial_seeds, config.seeds))}
    jobs = [Job(h, split, config.seed + i, config) for split, seeds in numbers.items() for i in seeds for h in heads]
    with ProcessPoolExecutor(config.processes, mp_context=get_context("spawn")) as pool:
        done = list(map(finish, jobs) if config.processes == 1 else pool.map(finish, jobs))
    values = matrices(heads, jobs, done)
    minutes = {h: [one["CPU minutes"] for job, one in zip(jobs, done, strict=True) if job.head == h] for h in heads}
    table = "\n".join(line for setting in values for line in table_of(setting, values[setting], minutes))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.txt").write_text(table + "\n")
    print(table)
    ours = intervals([values["20-way 1-shot"]["ProtoNet"]])[0]
    criteria = [
        Criterion("ProtoNet accuracy, 20-way 1-shot", ours.mean, ">=", 0.94, ci=ours.ends, reference=0.96),
        Criterion("ProtoNet, CPU minutes of training", max(minutes["ProtoNet"]), "<=", 15),
    ]
    if TRIALS in values:
        wrong = intervals([1 - values[TRIALS]["ProtoNet"]])[0]
        criteria.append(Criterion("ProtoNet error, trials", wrong.mean, "<=", 0.25, ci=wrong.ends, reference=0.137))
    claim = f"ProtoNet reaches 94 % on Omniglot 20-way 1-shot within 15 CPU minutes; {len(heads)} heads beside it."
    return RecipeResult("omniglot_heads", claim, config, criteria)


def matrices(heads: Sequence[str], jobs: Sequence[Job], done: Sequence[dict[str, Any]]) -> dict[str, dict[str, Array]]:
    """Accuracies (seeds, episodes) by setting and head."""
    settings = list(dict.fromkeys(name for found in done for name in found if name != "CPU minutes"))
    pairs = list(zip(jobs, done, strict=True))
    return {
        name: {h: np.array([found[name] for job, found in pairs if job.head == h and name in found]) for h in heads}
        for name in settings
    }


def table_of(setting: str, values: Mapping[str, Array], minutes: Mapping[str, list[float]]) -> list[str]:
    """Accuracy of each head, and its paired difference from ProtoNet with Holm-corrected p-value; errors in trials."""
    wrong = setting == TRIALS
    values = {name: 1 - one if wrong else one for name, one in values.items()}
    means = intervals(list(values.values()))
    gaps = family_intervals([paired(each, values["ProtoNet"]) for each in list(values.values())[1:]])
    lines = [f"\n{setting}, {'errors' if wrong else 'accuracy'} in %, difference from ProtoNet"]
    for name, mean, gap in zip(values, means, [None, *gaps], strict=True):
        text = f"{name:28} {100 * mean.mean:6.2f}  {np.mean(minutes[name]):5.1f} CPU minutes"
        if gap is not None and gap.ends is not None:
            low, high = gap.ends
            text += f"  {100 * gap.mean:+6.2f} [{100 * low:+.2f}, {100 * high:+.2f}]  p {gap.p:.2g}"
        lines.append(text)
    return lines


if __name__ == "__main__":
    run(main, Config)
