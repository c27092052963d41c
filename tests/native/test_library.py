"""A C file is compiled once, kept, and done without where it cannot be had."""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metaicl import MAML, EpisodeStream, Sinusoid
from metaicl.native import library, without_kernels
from metaicl.native.operators import is_available

needs_compiler = pytest.mark.skipif(library._compiler() is None, reason="no C compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A home without libraries, and nothing loaded yet."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("CC", raising=False)
    library._loaded.cache_clear()
    yield tmp_path
    library._loaded.cache_clear()


def answers() -> torch.Tensor:
    torch.manual_seed(0)
    episode = EpisodeStream(Sinusoid(), seed=0, split="train", n_shot=3, n_query=2, chunk_size=2)[0]
    learner = MAML(Sinusoid().spec)
    return learner(episode.support, episode.query.x).mean


@needs_compiler
def test_it_is_compiled_once_and_kept(fresh: Path) -> None:
    assert library.load("perceptron") is not None
    (made,) = (fresh / ".cache" / "metaicl" / "native").iterdir()
    library._loaded.cache_clear()  # as another process would
    before = made.stat().st_mtime_ns
    assert library.load("perceptron") is not None
    assert made.stat().st_mtime_ns == before
    with without_kernels():
        assert library.load("perceptron") is None
        assert not is_available(torch.float32)
    assert is_available(torch.float32)
    assert not is_available(torch.bfloat16)


@pytest.mark.parametrize("reason", ["no compiler", "switched off"])
def test_without_it_torch_does_the_work_silently(reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with without_kernels():
        expected = answers()
    if reason == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("METAICL_NATIVE", "0")
    assert library.load("perceptron") is None
    assert torch.equal(answers(), expected)


@pytest.mark.parametrize("script", ["echo 'no space left' >&2; exit 1", "echo > /dev/null; exit 0"])
def test_a_compiler_that_fails_is_warned_of_once(script: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "cc"
    broken.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{script}\n')
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(broken))
    with pytest.warns(RuntimeWarning, match=r"could not compile perceptron\.c, so torch does its work, more slowly"):
        answers()
    answers()  # a second warning would be an error
    assert not list((fresh / ".cache" / "metaicl" / "native").iterdir())


@needs_compiler
def test_a_home_that_cannot_be_written_to(fresh: Path) -> None:
    (fresh / ".cache").write_text("a file")
    assert library.load("perceptron") is not None


@needs_compiler
def test_other_flags_are_tried_where_the_first_are_unknown(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_FLAGS", (("-fno-such-flag",), ()))
    assert library.load("perceptron") is not None


@needs_compiler
def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    command = [*(library._compiler() or ()), *library._PLAIN, *library._PARALLEL, "-Wall", "-Wextra", "-Werror"]
    source = Path(library.__file__).with_name("perceptron.c")
    subprocess.run([*command, str(source), "-o", str(tmp_path / "out.so"), "-lm"], check=True)
    assert (tmp_path / "out.so").exists()
