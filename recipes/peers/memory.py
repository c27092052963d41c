"""Peak memory of one meta-gradient in this process: `python memory.py VARIANT STEPS` prints MiB (Linux)."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from peers.maml_steps import higher_steps, learn2learn_steps
from peers.work import Work

from metaicl import MAML, Learner
from metaicl.learners import IMAML
from metaicl.meta_step import MetaStep
from metaicl.peak_memory import read_peak, start_peak

OURS: dict[str, Callable[[int], Learner]] = {
    "plain": lambda steps: MAML(WORK.spec, net=WORK.net(), inner_steps=steps),
    "checkpoint every step": lambda steps: MAML(WORK.spec, net=WORK.net(), inner_steps=steps, checkpoint=True),
    "checkpoint every sqrt(K) steps": lambda steps: MAML(
        WORK.spec, net=WORK.net(), inner_steps=steps, checkpoint=math.isqrt(steps)
    ),
    "first order": lambda steps: MAML(WORK.spec, net=WORK.net(), inner_steps=steps, first_order=True),
    "implicit": lambda steps: IMAML(WORK.spec, net=WORK.net(), inner_steps=steps),
}
PEERS = {"learn2learn": learn2learn_steps, "higher": higher_steps}
WORK = Work(width=None, n_tasks=1, inner_steps=1)


def gradient(variant: str, steps: int) -> None:
    """Compute one, and drop it."""
    episode = WORK.episode()
    if variant in OURS:
        MetaStep(OURS[variant](steps))(episode)
    else:
        PEERS[variant](WORK.net(), F.cross_entropy, 0.01, steps)[0](episode)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, n_steps = sys.argv[1], int(sys.argv[2])
    gradient(name, 1)  # what is allocated once and for all
    held = start_peak(torch.device("cpu"))
    gradient(name, n_steps)
    found = read_peak(torch.device("cpu"), held)
    if found is None:
        sys.exit("this system does not tell a process its peak memory")
    print(found / 2**20)
