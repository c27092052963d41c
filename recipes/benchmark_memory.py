"""Peak memory of a meta-gradient as the inner loop grows: plain, checkpointed, implicit, learn2learn, higher.

Claim    Memory grows with the steps of a plain inner loop, by no more than their square root with checkpoints, and not
         at all with implicit gradients.
Run      python recipes/benchmark_memory.py --out runs/benchmark_memory
Smoke    python recipes/benchmark_memory.py --smoke --out runs/benchmark_memory
Method   Conv4-32, one task of 5-way 1-shot 15-query; each figure from a fresh process with one thread, as the highest
         resident memory during a gradient above that before it (Linux with glibc). Eager: a graph plans its own memory.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm.auto import tqdm

from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run

sys.path.insert(0, str(Path(__file__).parent))
from peers.memory import OURS, PEERS


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": (2, 4), "variants": ("plain", "implicit")}

    steps: tuple[int, ...] = option((1, 5, 20, 100), "lengths of the inner loop, growing")
    variants: tuple[str, ...] = option((), "names of what to measure; none measures all")


def peak(variant: str, steps: int) -> float:
    """MiB, from a process of its own."""
    script = Path(__file__).parent / "peers" / "memory.py"
    eager_malloc = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0"}  # gives back what is freed
    command = [sys.executable, script, variant, str(steps)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **eager_malloc})
    if found.returncode:
        raise RuntimeError(f"measuring {variant} failed:\n{found.stderr}")
    return float(found.stdout)


def main(config: Config) -> RecipeResult:
    """Measure and print the table."""
    variants = config.variants or (*OURS, *PEERS)
    jobs = tqdm([(variant, steps) for variant in variants for steps in config.steps], unit="process")
    found: dict[str, list[float]] = {variant: [] for variant in variants}
    for variant, steps in jobs:
        jobs.set_postfix_str(f"{variant}, {steps} steps")
        found[variant].append(peak(variant, steps))
    print(f"{'MiB above the start':32}" + "".join(f"K={steps:<8}" for steps in config.steps))
    for variant, values in found.items():
        print(f"{variant:32}" + "".join(f"{value:<10.0f}" for value in values))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.json").write_text(json.dumps({"steps": config.steps, "MiB": found}, indent=1) + "\n")
    grown = {variant: values[-1] - values[0] for variant, values in found.items()}
    root = math.sqrt(config.steps[-1] / config.steps[0])
    bounds = {"checkpoint every step": 1 / root, "checkpoint every sqrt(K) steps": 1 / root, "implicit": 0.05}
    criteria = [
        Criterion(
            f"{variant}: growth with K, over that of the plain loop", grown[variant] / grown["plain"], "<=", bound
        )
        for variant, bound in bounds.items()
        if variant in grown
    ]
    claim = "Memory grows like the square root of the inner steps with checkpoints, and not with implicit gradients."
    return RecipeResult("benchmark_memory", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
