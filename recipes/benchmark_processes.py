"""Episodes per second of a MAML training in one process of one thread, and in several.

Claim    Two processes of one thread train on nearly twice as many episodes per second as one.
Run      python recipes/benchmark_processes.py --out runs/benchmark_processes
Smoke    python recipes/benchmark_processes.py --smoke --out runs/benchmark_processes
Method   whole updates, sampling included, of the same learner on the same episodes; processes are started by torchrun
         and take turns with the lone one, a fresh start each time; medians. Only on a machine with as many idle cores
         as processes does it say anything.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm.auto import tqdm

from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

sys.path.insert(0, str(Path(__file__).parent))
from peers.training_rate import WORKS

NEARLY = 0.85  # of as many times as there are processes


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"seconds": 0.1, "repeats": 1, "works": ("sine waves, 200 tasks",)}

    works: tuple[str, ...] = option((), "names of what to time; none times all")
    processes: int = option(2, "processes beside one")
    seconds: float = option(4.0, "of training that are timed in each start")
    repeats: int = option(5, "starts of each number of processes")


def episodes_per_second(work: str, processes: int, seconds: float) -> float:
    """Of a training in so many processes, started for this."""
    script = Path(__file__).parent / "peers" / "training_rate.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    found = subprocess.run(
        [*launch, script, work, str(seconds)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{processes} processes on {work} failed:\n{found.stderr}")
    return float(found.stdout)


def main(config: Config) -> RecipeResult:
    """Let them take turns, and compare."""
    criteria, reported = [], {}
    for work in config.works or WORKS:
        rates: dict[int, list[float]] = {1: [], config.processes: []}
        for _ in tqdm(range(config.repeats), desc=work, unit="start"):
            for processes, found in rates.items():
                found.append(episodes_per_second(work, processes, config.seconds))
        one, many = (statistics.median(found) for found in rates.values())
        tqdm.write(f"{work}: {one:.0f} episodes a second in one process, {many:.0f} in {config.processes}")
        reported[f"episodes per second in one process, {work}"] = one
        name = f"{config.processes} processes / one, {work}"
        criteria.append(Criterion(name, many / one, ">=", NEARLY * config.processes))
    claim = f"{config.processes} processes of one thread train nearly {config.processes} times as fast as one."
    return RecipeResult("benchmark_processes", claim, config, criteria, reported=reported)


if __name__ == "__main__":
    run(main, Config)
