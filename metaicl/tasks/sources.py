"""Data from elsewhere: a cache folder, verified downloads, and archives that cannot write outside their folder.

Nothing here runs unless a caller asks for it, and nothing is ever seen half-done: files and folders appear under
their final name complete and verified, or not at all.
"""

import hashlib
import lzma
import os
import shutil
import stat
import time
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import BaseHandler, ProxyHandler, Request, build_opener

from tqdm import tqdm

from metaicl.checks import check_count, check_positive

_ALGORITHMS = {64: "sha256", 32: "md5"}  # by the number of hexadecimal digits
_BLOCK = 1 << 16  # bytes read at once
_LOCAL = ("localhost", "127.0.0.1", "::1")
_MOST_MEMBERS = 1_000_000
_SLOWEST = 1024  # bytes per second, below which a transfer counts as stalled
_SMALL = 1 << 20  # bytes: an archive that unpacks to less is no bomb, however well it is packed
_UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable METAICL_DATA, else ~/.cache/metaicl. It may not exist yet."""
    named = os.environ.get("METAICL_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "metaicl"


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write, which appears as `path` when the block ends, and not at all if the block raises.

    The old content, if any, stays readable until then. Missing parent folders are made.

    Raises:
        OSError: If `path` is something other than a regular file, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} must be a regular file to be replaced; it is not one")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # in the same folder, for only there a rename is atomic
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_file(path: str | Path, checksum: str) -> Path:
    """Return `path` if the file there has the checksum.

    Args:
        path: A file.
        checksum: The hexadecimal digits of a SHA-256 (64) or an MD5 (32); "sha256:" or "md5:" may stand before them.

    Raises:
        ValueError: If `checksum` is no checksum.
        OSError: If the file cannot be read, or has another checksum.
    """
    digest, expected = _parse_checksum(checksum)
    head = b""
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            head = head or block
            digest.update(block)
    _check_digest(digest, expected, head, f"{path} (delete it to fetch it again)")
    return Path(path)


def download(
    url: str,
    *,
    checksum: str,
    folder: str | Path | None = None,
    retries: int = 3,
    timeout: float = 30.0,
    max_bytes: int = 1 << 32,
) -> Path:
    """Fetch `url` into `folder`, unless the verified file is there already.

    Args:
        url: https; http is for servers on this machine only.
        checksum: Of the file, see `check_file`.
        folder: Where to keep it, under the last part of the URL's path; None is `cache_folder()`.
        retries: Attempts after the first, 1, 2, 4 ... seconds apart, when the server or the way to it fails.
            A wrong checksum and a refusal (404 and the like) are final.
        timeout: Longest silence, in seconds. A transfer slower than 1 KiB/s is given up as well.
        max_bytes: Longest body accepted.

    Returns:
        The path of the verified file.

    Raises:
        ValueError: If an argument is out of range, or the URL or a redirect is not https.
        OSError: If the file could not be fetched, or if what came, or lay there already, has another checksum.
    """
    _check_url(url)
    _parse_checksum(checksum)
    retries = check_count("retries", retries, minimum=0)
    max_bytes = check_count("max_bytes", max_bytes)
    path = Path(cache_folder() if folder is None else folder) / _file_name(url)
    if path.exists():
        return check_file(path, checksum)
    for attempt in range(retries + 1):
        try:
            _fetch(url, path, checksum, check_positive("timeout", timeout), max_bytes)
            break
        except (_TransientError, URLError, TimeoutError, ConnectionError, HTTPException) as error:
            refused = isinstance(error, HTTPError) and error.code < 500 and error.code != 429
            if refused or attempt == retries:
                raise OSError(
                    f"could not fetch {url}, tried {attempt + 1} times; the last answer was: {error}"
                ) from error
        time.sleep(2.0**attempt)
    return path


def extract_zip(path: str | Path, folder: str | Path, *, max_bytes: int = 1 << 34, max_ratio: float = 200.0) -> Path:
    """Unpack an archive into a new folder, all of it or nothing; see `open_zip` for what is refused.

    Returns:
        `folder`.

    Raises:
        FileExistsError: If `folder` exists and is not an empty folder.
        OSError: If the archive is damaged or hostile.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} must be absent or an empty folder to unpack {path} into; it is not")
    part = folder.with_name(f".{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        with open_zip(path, max_bytes=max_bytes, max_ratio=max_ratio) as archive:
            for member in archive.infolist():
                target = part.joinpath(*_parts(member.filename))
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, open(target, "xb") as file:
                    shutil.copyfileobj(packed, file)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


@contextmanager
def open_zip(path: str | Path, *, max_bytes: int = 1 << 34, max_ratio: float = 200.0) -> Iterator[zipfile.ZipFile]:
    """A zip archive to read, once it is known to be safe to unpack.

    Refused are names that are absolute, climb with "..", hold a backslash, a colon or a control character (before
    or after Unicode compatibility normalization) or occur twice; links and devices; encrypted members; and bombs.

    Args:
        path: The archive.
        max_bytes: Most bytes it may unpack to. Sizes are those the archive declares: `zipfile` reads no further.
        max_ratio: Most times its own size on disk it may unpack to.

    Raises:
        OSError: If the archive is damaged or hostile, also when that shows only while it is read.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, path, max_bytes, max_ratio)
            yield archive
    except _UNREADABLE as error:
        with open(path, "rb") as file:
            raise OSError(f"{path} is no sound zip archive: {error}{_looks_like(file.read(_BLOCK))}") from error


class _TransientError(OSError):
    """A failure that another attempt may not meet."""


class _SecureOnly(BaseHandler):
    """Sees every request before it leaves, those of redirects too."""

    def http_request(self, request: Request) -> Request:
        """Refuse what is not https (or on this machine)."""
        _check_url(request.full_url)
        return request

    ftp_request = http_request


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in _LOCAL
    if not parts.hostname or (parts.scheme != "https" and not local):
        raise ValueError(f"url must be an https address (http on this machine only); got {url!r}")


def _file_name(url: str) -> str:
    name = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    if not name or name.startswith(".") or _unsafe(name):
        raise ValueError(f"the path of url must end in a plain file name; got {url!r}")
    return name


def _fetch(url: str, path: Path, checksum: str, timeout: float, max_bytes: int) -> None:
    digest, expected = _parse_checksum(checksum)
    local = urlsplit(url).scheme == "http"
    opener = build_opener(_SecureOnly, *([ProxyHandler({})] if local else []))
    start, received, head = time.monotonic(), 0, b""
    with opener.open(Request(url, headers={"User-Agent": "metaicl"}), timeout=timeout) as response:
        assert isinstance(response, HTTPResponse)
        total = response.length
        bar = tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None, leave=False)
        with bar, atomic_file(path) as file:
            while block := response.read1(_BLOCK):
                received += len(block)
                if received > max_bytes:
                    raise OSError(f"{url} is longer than max_bytes = {max_bytes}")
                if time.monotonic() - start > timeout + received / _SLOWEST:
                    raise _TransientError(f"stalled after {received} bytes in {time.monotonic() - start:.0f} s")
                head = head or block
                digest.update(block)
                file.write(block)
                bar.update(len(block))
            if total is not None and received < total:
                raise _TransientError(f"the connection closed after {received} of {total} bytes")
            _check_digest(digest, expected, head, url)


def _parse_checksum(checksum: str) -> tuple[Any, str]:
    algorithm, _, digits = checksum.rpartition(":")
    digits = digits.lower()
    known = _ALGORITHMS.get(len(digits))
    if known is None or algorithm not in ("", known) or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"checksum must be the hexadecimal digits of a SHA-256 (64) or an MD5 (32); got {checksum!r}")
    return hashlib.new(known, usedforsecurity=False), digits


def _check_digest(digest: Any, expected: str, head: bytes, what: str) -> None:
    if digest.hexdigest() != expected:
        got = f"{digest.name} {digest.hexdigest()}{_looks_like(head)}"
        raise OSError(f"{what} must have the {digest.name} {expected}; got {got}")


def _looks_like(head: bytes) -> str:
    start = head.lstrip()[:32].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "; it is a web page, perhaps of a proxy or a log-in"
    return "" if head else "; it is empty"


def _check_members(archive: zipfile.ZipFile, path: Path, max_bytes: int, max_ratio: float) -> None:
    members = archive.infolist()
    if len(members) > _MOST_MEMBERS:
        raise OSError(f"{path} must have at most {_MOST_MEMBERS} members; got {len(members)}")
    seen: dict[tuple[str, ...], bool] = {}  # the names as a case-blind file system sees them: is it a folder?
    for member in members:
        name = member.orig_filename  # `filename` is cut at a NUL
        if any(map(_unsafe, _parts(name))) or not _parts(name) or name.startswith("/"):
            raise OSError(f"{path} holds the unsafe name {name!r}; nothing was unpacked")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
            raise OSError(f"{path} holds {name!r}, a link, a device or an encrypted file; nothing was unpacked")
        key = tuple(unicodedata.normalize("NFKC", part).casefold() for part in _parts(name))
        if key in seen or any(seen.get(key[:i]) is False for i in range(1, len(key))):
            raise OSError(f"{path} holds the name {name!r} twice; nothing was unpacked")
        seen[key] = member.is_dir()
    total, size = sum(member.file_size for member in members), path.stat().st_size
    if total > max_bytes or total > max(max_ratio * size, _SMALL):
        limit = f"{max_bytes} bytes and {max_ratio:g} times its {size} bytes"
        raise OSError(f"{path} must unpack to at most {limit}; got {total}. It looks like a bomb")


def _parts(name: str) -> list[str]:
    return name.removesuffix("/").split("/") if name.strip("/") else []


def _unsafe(part: str) -> bool:
    """Whether a path part could mean another place on some system."""
    plain = unicodedata.normalize("NFKC", part)
    return plain.strip(" .") == "" or any(c in "/\\:" or unicodedata.category(c) == "Cc" for c in part + plain)
