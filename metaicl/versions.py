"""What a result depends on: the versions of what made it."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch


def versions() -> dict[str, str]:
    """Python, torch, numpy, metaicl with its commit, machine and threads."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "metaicl": package_version("metaicl"),
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def package_version(name: str) -> str:
    """The version of an installed package; "not installed" of one that is only on the path, or not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """That of the checkout which holds this file; another repository may lie around an installed package."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commands = [*git, "ls-files", "--error-unmatch", Path(__file__).name], [*git, "rev-parse", "--short", "HEAD"]
    try:
        found = [subprocess.run(one, capture_output=True, text=True, check=True, timeout=5) for one in commands]
        return found[-1].stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
