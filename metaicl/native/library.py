"""A C file of this package, compiled for the machine at hand when it is first needed, and loaded."""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

VECTOR_BYTES = 32
"""To whole vectors of this size rows are padded, in C and in the memory that Python gives it."""

_FOLDER = Path(__file__).parent
_PLAIN = ("-std=gnu11", "-O3", "-fno-math-errno", "-shared", "-fPIC", f"-DVECTOR_BYTES={VECTOR_BYTES}")
_PARALLEL = () if platform.system() == "Darwin" else ("-fopenmp",)  # Apple's compiler has none
_FLAGS = ((*_PARALLEL, "-march=native"), ("-mcpu=native",), _PARALLEL, ())  # the first that the compiler takes
_SECONDS = 120  # after which a compiler is given up

_disabled = 0


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Leave everything inside to torch, to compare with it. `METAICL_NATIVE=0` does the same to a whole process."""
    global _disabled
    _disabled += 1
    try:
        yield
    finally:
        _disabled -= 1


def load(name: str) -> ctypes.CDLL | None:
    """The library made of `name`.c; None where there is no compiler, or kernels are switched off.

    The compiler is the environment variable CC, or else cc, gcc or clang. What it made is kept in the folder
    `native` of the cache, under a name that tells source, compiler and processor apart. One that fails is warned of,
    once, by a RuntimeWarning.
    """
    return None if _disabled else _loaded(name)


@functools.cache
def _loaded(name: str) -> ctypes.CDLL | None:
    compiler = _compiler()
    if compiler is None or os.environ.get("METAICL_NATIVE") == "0":
        return None
    source = _FOLDER / f"{name}.c"
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS, check=True).stdout
        parts = (
            *(path.read_bytes() for path in (source, *sorted(_FOLDER.glob("*.h")))),
            shlex.join(compiler).encode(),
            version,
            _processor(),
            repr((_PLAIN, _FLAGS)).encode(),
        )
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]
        return ctypes.CDLL(str(_made(compiler, source, f"{name}-{key}.so")))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        last = said.decode(errors="replace").strip().splitlines()[-1:]
        warnings.warn(
            f"{shlex.join(compiler)} could not compile {source.name}, so torch does its work, more slowly: {last}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiler() -> list[str] | None:
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    return next(([found] for found in map(shutil.which, ("cc", "gcc", "clang")) if found), None)


def _processor() -> bytes:
    """What sets apart machines that may share a cache but not machine code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})).encode()


def _made(compiler: list[str], source: Path, name: str) -> Path:
    """The path of the library, which is compiled if it is not there; it appears whole or not at all."""
    folder = _writable_folder()
    made = folder / name
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(dir=folder) as place:
        part = Path(place) / name
        for i, flags in enumerate(_FLAGS):
            command = [*compiler, *_PLAIN, *flags, str(source), "-o", str(part), "-lm"]
            last = i + 1 == len(_FLAGS)
            if subprocess.run(command, capture_output=True, timeout=_SECONDS, check=last).returncode == 0:
                break
        os.replace(part, made)
    return made


def _writable_folder() -> Path:
    """The folder where libraries are kept, or without one a folder of this process alone."""
    with contextlib.suppress(OSError, RuntimeError):  # no home, or none that can be written to
        folder = Path.home() / ".cache" / "metaicl" / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    own = tempfile.mkdtemp(prefix="metaicl-native-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)
