"""What `import metaicl` gives, and what it costs."""

import subprocess
import sys

import metaicl
import metaicl.learners
import metaicl.tasks

OPTIONAL = (
    "sklearn",
    "pandas",
    "faiss",
    "learn2learn",
    "higher",
    "tensorboard",
    "torchvision",
    "gym",
    "matplotlib",
    "PIL",
)


def test_the_public_names_exist_and_are_few() -> None:
    assert len(metaicl.__all__) <= 30
    assert sorted(metaicl.__all__) == sorted(set(metaicl.__all__))
    for module in (metaicl, metaicl.learners, metaicl.tasks):
        assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_importing_loads_no_optional_package() -> None:
    code = f"import sys, metaicl; print([m for m in {OPTIONAL!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert found.stderr == ""
