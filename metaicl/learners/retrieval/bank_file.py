"""One file for named tensors: a magic line with a checksum, a table of contents, and the bytes. Nothing is executed."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaicl.files import atomic_write

_MAGIC = b"metaicl-bank"
_FORMAT = 1
_HEADER_LIMIT = 256
_ALIGNMENT = 64
_DTYPES = {
    name: getattr(torch, name)
    for name in ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
}


class CorruptBankError(RuntimeError):
    """The file is not what `write_tensors` wrote, or was changed since."""


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors and settings (numbers, strings) atomically. Needs memory for one copy.

    Raises:
        TypeError: If a tensor has a dtype that the format does not know.
        OSError: If the file cannot be written; an older one then stands.
    """
    table, offset = {}, 0
    for name, value in tensors.items():
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise TypeError(f"a bank file holds {sorted(_DTYPES)}; {name} is {dtype}")
        table[name] = {"dtype": dtype, "shape": list(value.shape), "offset": offset}
        offset += -(-value.numel() * value.element_size() // _ALIGNMENT) * _ALIGNMENT
    contents = json.dumps({"settings": dict(settings), "tensors": table}).encode()
    contents += b" " * (-len(contents) % _ALIGNMENT)
    payload = bytearray(len(contents) + offset)
    payload[: len(contents)] = contents
    for name, value in tensors.items():
        start = len(contents) + table[name]["offset"]
        if value.numel():
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            payload[start : start + data.nbytes] = data.data
    digest = hashlib.sha256(payload).hexdigest().encode()
    head = b"%s %d %s %d %d" % (_MAGIC, _FORMAT, digest, len(contents), len(payload))
    payload[:0] = head + b" " * (_HEADER_LIMIT - 1 - len(head)) + b"\n"
    atomic_write(path, payload)  # type: ignore[arg-type]  # any bytes-like will do


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, verified: tensors on the CPU, and settings.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptBankError: If the file was truncated or changed, or is something else.
    """
    path = Path(path)
    data = bytearray(path.read_bytes())
    fields = bytes(data[:_HEADER_LIMIT]).split()
    if len(fields) != 5 or fields[0] != _MAGIC or not all(fields[i].isdigit() for i in (1, 3, 4)):
        raise CorruptBankError(f"{path} is no memory bank written by MemoryBank.save")
    form, size, total = (int(fields[i]) for i in (1, 3, 4))
    if form != _FORMAT:
        raise CorruptBankError(f"{path} has bank format {form}; this version reads format {_FORMAT}; update metaicl")
    if len(data) - _HEADER_LIMIT != total:
        raise CorruptBankError(f"{path} must hold {total} bytes after its head; got {len(data) - _HEADER_LIMIT}")
    if hashlib.sha256(memoryview(data)[_HEADER_LIMIT:]).hexdigest().encode() != fields[2]:
        raise CorruptBankError(f"{path} was changed after it was written: its SHA-256 does not fit its content")
    contents = json.loads(data[_HEADER_LIMIT : _HEADER_LIMIT + size])
    tensors = {name: _read(data, entry, _HEADER_LIMIT + size) for name, entry in contents["tensors"].items()}
    return tensors, contents["settings"]


def _read(data: bytearray, entry: Mapping[str, Any], start: int) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start + entry["offset"]).reshape(shape)
