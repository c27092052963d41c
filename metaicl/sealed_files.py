"""Files that are whole or refused: a first line with a checksum, and plain data that can be read without running code.

The first line is `metaicl-<name> <version> <sha256> <bytes>`; what follows is a `torch.save` of plain containers and
tensors, read back with `weights_only=True`. Neither torch nor safetensors notices a flipped bit; this does.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaicl.files import atomic_write

_HEADER_LIMIT = 256


@dataclass(frozen=True)
class SealedFormat:
    """One kind of file.

    Args:
        name: What it is called, in one word.
        version: Of the layout of its content.
        damaged: Raised with a message, if a file is not what was written.
        incompatible: Likewise, if a file has another version.
    """

    name: str
    version: int
    damaged: type[Exception]
    incompatible: type[Exception]

    def write(self, path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
        """Write `content` atomically, with its checksum. Needs memory for one copy.

        Args:
            path: The file; its directory must exist.
            content: Tensors, numbers, strings and None in dicts, lists and tuples.

        Raises:
            TypeError: If something in `content` could not be read back safely; it is named by its place.
            OSError: If the file cannot be written; an older one then stands.
        """
        self._check_plain(content, "content")
        buffer = io.BytesIO()
        torch.save(dict(content), buffer)
        payload = buffer.getbuffer()
        digest = hashlib.sha256(payload).hexdigest()
        atomic_write(path, f"metaicl-{self.name} {self.version} {digest} {len(payload)}\n".encode(), payload)

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """What `write` wrote, verified, with its tensors on the CPU. No code in the file is ever run.

        Raises:
            FileNotFoundError: If there is no such file.
            Exception: `damaged` if the file was truncated or changed, or is something else, and `incompatible` if it
                has another version; the message says what.
        """
        path = Path(path)
        if path.is_dir():
            raise self.damaged(f"{path} is a directory, not a {self.name}; name one of its files")
        payload = self._verified_payload(path)
        try:
            content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        except Exception as error:  # the checksum fits, so it was made this way: a hostile pickle may raise anything
            raise self.damaged(f"{path} holds more than tensors and plain containers, and is refused") from error
        if not isinstance(content, dict):
            raise self.damaged(f"{path} must hold a dict; got {type(content).__name__}")
        return content

    def _verified_payload(self, path: Path) -> bytes:
        with path.open("rb") as file:
            header = file.readline(_HEADER_LIMIT)
            fields = header[:-1].split(b" ")
            well_formed = header.endswith(b"\n") and len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit()
            if not well_formed or fields[0] != b"metaicl-%s" % self.name.encode():
                start = header + file.read(_HEADER_LIMIT)
                raise self.damaged(f"{path} is no metaicl {self.name}; it {self._look(start[:_HEADER_LIMIT])}")
            if int(fields[1]) != self.version:
                raise self.incompatible(
                    f"{path} has {self.name} format {int(fields[1])}; "
                    f"this version reads format {self.version}; update metaicl, or check the file"
                )
            payload = file.read()
        if len(payload) != int(fields[3]):
            raise self.damaged(f"{path} must hold {int(fields[3])} bytes after its first line; got {len(payload)}")
        if hashlib.sha256(payload).hexdigest().encode() != fields[2]:
            raise self.damaged(f"{path} was changed after it was written: its SHA-256 does not fit its content")
        return payload

    def _look(self, start: bytes) -> str:
        text = start.lstrip().lower()
        if not start:
            return "is empty"
        if text.startswith((b"<!doctype", b"<html", b"<?xml")):
            return "looks like HTML, perhaps the error page of a download"
        if text.startswith(b"pk\x03\x04"):
            return "looks like a plain torch.save file; read it with torch.load(path, weights_only=True)"
        if text.startswith(b"metaicl-"):
            kind = text.split()[0].removeprefix(b"metaicl-").decode(errors="replace")
            return "has a damaged first line" if kind == self.name else f"begins like a metaicl {kind}"
        printable = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
        return "looks like a text file" if printable else "starts with bytes of another format"

    def _check_plain(self, value: Any, place: str) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                self._check_plain(item, f"{place}[{key!r}]")
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                self._check_plain(item, f"{place}[{index}]")
        elif value is not None and not isinstance(value, (Tensor, bool, int, float, str, bytes)):
            kind = type(value).__name__
            raise TypeError(f"a {self.name} holds tensors, numbers, strings and plain containers; {place} is a {kind}")
