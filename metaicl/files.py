"""Files that are never half written, and directories that one run owns at a time."""

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # a system without POSIX locks, see lock_directory
    fcntl = None

_PARTIAL = ".partial"
_LOCK = ".lock"
_HELD: set[int] = set()  # descriptors of the locks of this process, which a forked child must let go


def atomic_write(path: str | os.PathLike[str], *data: bytes | memoryview) -> None:
    """Replace the file at `path` by one that holds `data`; whoever reads sees the old file or the new one.

    The bytes reach the disk under another name in the same directory before they get the final one. The mode
    of an existing file is kept, and a link stays a link to the file that is replaced.

    Args:
        path: A regular file, or nothing yet; its directory must exist.
        data: The whole content, in one piece or in several.

    Raises:
        OSError: If a step fails (no space, no permission, `path` is a directory or a device); the old file stands
            and nothing else is left behind.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    partial = target.parent / f".{uuid.uuid4().hex}{_PARTIAL}"
    try:
        with naming(target):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if mode is not None:
                    os.chmod(partial, mode)
                for piece in data:
                    _write_all(descriptor, piece)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(partial, target)
            _sync_directory(target.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Writing that says which file it was where it fails: a full disk names none.

    Raises:
        OSError: Of the same kind, with the path.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error


def remove_partial_files(directory: str | os.PathLike[str]) -> int:
    """Remove what writers that were killed left in `directory`, and say how many files that were.

    Call it only while holding the lock of the directory: a partial file may belong to a living writer.
    """
    partials = list(Path(directory).glob(f".*{_PARTIAL}"))
    for partial in partials:
        partial.unlink(missing_ok=True)
    return len(partials)


@contextlib.contextmanager
def lock_directory(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Own `directory` until the context ends; the owner's process id stands in its file `.lock`.

    The operating system drops the lock when its process ends, however it ends, so the lock of a dead process
    never stands in the way. Systems without POSIX locks (Windows) go unprotected.

    Raises:
        BlockingIOError: If another run owns the directory; the message gives its process id.
    """
    if fcntl is None:
        yield
        return
    path = Path(directory) / _LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise BlockingIOError(
                error.errno,
                f"{directory} is in use by another run, process {owner}; wait for it or choose another directory",
            ) from None
        _HELD.add(descriptor)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)


def _release_in_child() -> None:
    # A forked child (a worker that samples ahead) shares the lock and would hold it after the death of its parent.
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _mode_of(target: Path) -> int | None:
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"cannot write {target}: it is a directory")
    if not stat.S_ISREG(found.st_mode):  # renaming over a device or a pipe would destroy it
        raise OSError(f"cannot write {target}: it is not a regular file")
    return stat.S_IMODE(found.st_mode)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
