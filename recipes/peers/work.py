"""What benchmarks of gradient learners share: nets and episodes of a size, and interleaved timing."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from metaicl import EpisodeStream, Sinusoid, TaskSpec
from metaicl.episode import Episode, Examples
from metaicl.nets.backbones import MLP

IMAGES = TaskSpec("classification", (1, 28, 28), "image", n_way=5)


@dataclass(frozen=True)
class Work:
    """A net, an episode and an inner loop, and how many times as fast as each peer we want to be."""

    width: int | None  # of an MLP on sine waves; None: Conv4-32 on images
    n_tasks: int
    inner_steps: int
    bounds: Mapping[str, float] = field(default_factory=dict)

    @property
    def spec(self) -> TaskSpec:
        """What the tasks look like."""
        return IMAGES if self.width is None else Sinusoid().spec

    def net(self) -> nn.Module:
        """Initial weights, always the same."""
        torch.manual_seed(0)
        if self.width is not None:
            return MLP([1, self.width, self.width, 1])
        layers: list[nn.Module] = []
        for channels in (1, 32, 32, 32):
            norm = nn.BatchNorm2d(32, track_running_stats=False)
            layers += [nn.Conv2d(channels, 32, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5))

    def episode(self) -> Episode:
        """10 + 10 points of sine waves, or noise for 5-way 1-shot 15-query pictures: timing needs no real ones."""
        if self.width is not None:
            shots = {"n_shot": 10, "n_query": 10, "chunk_size": self.n_tasks}
            return EpisodeStream(Sinusoid(), seed=0, split="train", **shots)[0]
        source = torch.Generator().manual_seed(0)
        labels = [torch.arange(5).repeat(rows).expand(self.n_tasks, -1) for rows in (1, 15)]
        support, query = (Examples(torch.randn(*y.shape, 1, 28, 28, generator=source), y) for y in labels)
        return Episode(support, query)


def medians(
    calls: Mapping[str, Callable[[], Any]], repeats: int, *, turn: float, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of each call.

    The calls take turns, so that a busy moment hits all. A turn calls once without a watch and then for `turn` seconds:
    in a training loop a call finds its data in the caches, and no threads of others that are still awake. 0 calls once,
    and times that. A call that has used up 20 seconds in three turns rests.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            if len(times[name]) >= 3 and sum(times[name]) > 20:
                continue
            if turn:
                call()
            count, began = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - began < turn:
                call()
                count += 1
                if device != "cpu":
                    torch.cuda.synchronize()
            if repeat >= 2:  # the first two turns warm up
                times[name].append((time.perf_counter() - began) / count)
    return {name: statistics.median(values) for name, values in times.items()}
