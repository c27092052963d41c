"""Episodes per second of a training, in as many processes as torchrun starts: `training_rate.py WORK SECONDS`."""

import sys
import time

import torch
from torch import distributed

from metaicl import MAML, Glyphs, Sinusoid, TaskDistribution, outer_loop
from metaicl.distributed import n_processes, rank, start

WORKS: dict[str, tuple[type[TaskDistribution], int, int, int]] = {  # tasks, how many an update, shots, query rows
    "sine waves, 200 tasks": (Sinusoid, 200, 10, 10),
    "sine waves, 1000 tasks": (Sinusoid, 1000, 10, 10),
    "letters, 16 tasks": (Glyphs, 16, 1, 5),
}
WARM_UP, TOGETHER, MOST = 3, 5, 10**6  # updates; the first process looks at the clock after every few


def train(work: str, seconds: float) -> float:
    """Train MAML with five inner steps for so long, and count."""
    make, n_tasks, n_shot, n_query = WORKS[work]
    tasks = make()
    torch.manual_seed(0)
    learner = MAML(tasks.spec, inner_steps=5)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    began = 0.0
    for step in outer_loop(
        learner, tasks, optimizer, steps=MOST, meta_batch_size=n_tasks, n_shot=n_shot, n_query=n_query
    ):
        if step.index == WARM_UP:
            began = time.perf_counter()
        if step.index > WARM_UP and step.index % TOGETHER == 0:
            ended = torch.tensor(float(time.perf_counter() - began > seconds))
            if n_processes() > 1:
                distributed.broadcast(ended, 0)  # all stop after the same update
            if ended:
                break
    return (step.index - WARM_UP) * n_tasks / (time.perf_counter() - began)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with start():
        found = train(sys.argv[1], float(sys.argv[2]))
        if rank() == 0:
            print(found)
