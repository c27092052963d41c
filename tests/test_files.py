import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest.mock import patch

import pytest

from metaicl.files import atomic_write, lock_directory, remove_partial_files


def test_atomic_write_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a file with spaces é"
    atomic_write(path, b"old")
    atomic_write(path, b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_atomic_write_keeps_the_mode_and_honors_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    umask = os.umask(0o027)
    try:
        atomic_write(path, b"1")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    atomic_write(path, b"2")
    assert path.stat().st_mode & 0o777 == 0o604


def test_atomic_write_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    atomic_write(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"1"


def test_atomic_write_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        atomic_write(tmp_path / "pipe", b"1")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        atomic_write(tmp_path, b"1")
    with pytest.raises(FileNotFoundError, match="cannot write"):
        atomic_write(tmp_path / "absent" / "file", b"1")


@pytest.mark.parametrize("name", ["open", "write", "fsync", "close", "replace", "chmod"])
@pytest.mark.parametrize("number", [13, 28, 5])  # permission, no space, input/output error
def test_a_write_fault_leaves_the_old_file(tmp_path: Path, name: str, number: int) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    real = getattr(os, name)

    def fail(*args: object, **choices: object) -> None:
        if name == "close":  # a failing close has closed
            real(*args)
        raise OSError(number, os.strerror(number))

    with (
        patch(f"metaicl.files.os.{name}", fail),
        pytest.raises(OSError, match=f"cannot write .*file: {os.strerror(number)}"),
    ):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_short_write_is_continued(tmp_path: Path) -> None:
    real = os.write
    with patch("metaicl.files.os.write", lambda descriptor, data: real(descriptor, data[:7])):
        atomic_write(tmp_path / "file", b"0123456789" * 5)
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 5


def test_readers_see_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]
    atomic_write(path, contents[0])
    seen: set[bytes] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents * 10:
        atomic_write(path, content)
    done.set()
    reader.join()
    assert seen <= set(contents)


def test_remove_partial_files(tmp_path: Path) -> None:
    (tmp_path / ".0123.partial").write_bytes(b"half")
    (tmp_path / "kept.partial").write_bytes(b"not ours")
    assert remove_partial_files(tmp_path) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["kept.partial"]


def test_a_second_owner_is_refused_by_process_id(tmp_path: Path) -> None:
    with lock_directory(tmp_path):
        with (
            pytest.raises(BlockingIOError, match=f"in use by another run, process {os.getpid()};"),
            lock_directory(tmp_path),
        ):
            pass
        attempt = "from metaicl.files import lock_directory\nwith lock_directory('.'): pass"
        found = subprocess.run(
            [sys.executable, "-c", attempt], cwd=tmp_path, env=_environment(), capture_output=True, text=True
        )
        assert f"process {os.getpid()};" in found.stderr
    with lock_directory(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    die = "import os\nfrom metaicl.files import lock_directory\nwith lock_directory('.'): os.kill(os.getpid(), 9)"
    found = subprocess.run([sys.executable, "-c", die], cwd=tmp_path, env=_environment(), check=False)
    assert found.returncode == -9
    dead = (tmp_path / ".lock").read_text()
    with lock_directory(tmp_path):
        assert (tmp_path / ".lock").read_text() != dead


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    (read, write), (told, tell) = os.pipe(), os.pipe()
    with lock_directory(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(tell, b"x")
            os.read(read, 1)
            os._exit(0)
        os.read(told, 1)
    try:
        with lock_directory(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        for descriptor in (read, write, told, tell):
            os.close(descriptor)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
