"""Checkpoints that are whole or refused: one file with a magic line, a checksum and plain data.

The first line is `metaicl-checkpoint <format> <sha256> <bytes>`; what follows is a `torch.save` of plain containers
and tensors, read back with `weights_only=True`. Neither torch nor safetensors notices a flipped bit; this does.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaicl.files import atomic_write
from metaicl.learner import Learner

_MAGIC = b"metaicl-checkpoint"
_FORMAT = 1
_HEADER_LIMIT = 256
_SHOWN = 10  # differences listed in a message


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


class CorruptCheckpointError(CheckpointError):
    """The file is not what was written, or never was a checkpoint."""


class IncompatibleCheckpointError(CheckpointError):
    """The file is whole but belongs to something else."""


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write `content` atomically, with its checksum.

    Args:
        path: The file; its directory must exist.
        content: Tensors, numbers, strings and None in dicts, lists and tuples.

    Raises:
        TypeError: If something in `content` could not be read back safely; it is named by its place.
        OSError: If the file cannot be written; an older one then stands.
    """
    _check_plain(content, "content")
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest()
    atomic_write(path, b"%s %d %s %d\n" % (_MAGIC, _FORMAT, digest.encode(), len(payload)) + payload)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, verified, with its tensors on the CPU. No code in the file is ever run.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptCheckpointError: If the file was truncated or changed, or is something else; the message says what.
        IncompatibleCheckpointError: If it has another format than this version writes.
    """
    path = Path(path)
    if path.is_dir():
        raise CorruptCheckpointError(f"{path} is a directory, not a checkpoint; name one of its files")
    payload = _verified_payload(path, path.read_bytes())
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # the checksum fits, so the file was made this way: a hostile pickle may raise anything
        raise CorruptCheckpointError(f"{path} holds more than tensors and plain containers, and is refused") from error
    if not isinstance(content, dict):
        raise CorruptCheckpointError(f"{path} must hold a dict; got {type(content).__name__}")
    return content


def save_learner(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Save the weights and buffers of a learner, to be loaded by `load_learner_weights`.

    The code that builds the learner is not saved: build it the same way, then load.
    """
    content = {"learner": type(learner).__name__, "spec": asdict(learner.spec), "weights": learner.state_dict()}
    save_checkpoint(path, content)


def load_learner_weights(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Load what `save_learner` saved into a learner that was built the same way.

    Buffers that `prepare` fills, such as a memory bank, take the size they were saved with.

    Raises:
        CheckpointError: If the file is damaged, or was saved from another learner; the message lists the differences.
            The learner is then left as it was.
    """
    content = load_checkpoint(path)
    if "weights" not in content or "learner" not in content:
        raise IncompatibleCheckpointError(
            f"{path} was not written by save_learner; it holds {sorted(content)[:_SHOWN]}"
        )
    if content["learner"] != type(learner).__name__:
        raise IncompatibleCheckpointError(
            f"{path} holds the weights of a {content['learner']}; got a {type(learner).__name__} to load them into"
        )
    load_weights(learner, content["weights"], source=str(path))


def load_weights(learner: nn.Module, weights: Mapping[str, Any], *, source: str) -> None:
    """Load a state dict into a learner, all of it or nothing.

    Args:
        learner: Its parameters must have the names and shapes of `weights`; its buffers take the shapes found there.
        weights: From `state_dict()`.
        source: Where they come from, for the message.

    Raises:
        IncompatibleCheckpointError: If names or shapes differ.
    """
    resized = _resized_buffers(learner, weights)
    differences = _differences(learner.state_dict(), weights, resized)
    if differences:
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        listed = "".join(f"\n  {line}" for line in differences[:_SHOWN])
        raise IncompatibleCheckpointError(f"{source} does not fit this {type(learner).__name__}:{listed}{more}")
    for name, (owner, leaf) in resized.items():
        old, saved = owner._buffers.get(leaf), weights[name]
        floating = old is not None and old.is_floating_point() and saved.is_floating_point()
        owner._buffers[leaf] = torch.empty_like(
            saved,
            dtype=old.dtype if old is not None and floating else None,  # the learner's precision, not the file's
            device=_device_of(learner) if old is None else old.device,
        )
    learner.load_state_dict(weights)


def _resized_buffers(learner: nn.Module, weights: Mapping[str, Any]) -> dict[str, tuple[nn.Module, str]]:
    """The buffers whose saved value has another shape or is new, with the module that owns each."""
    resized = {}
    for prefix, module in learner.named_modules():
        start = f"{prefix}." if prefix else ""
        buffers = dict(module._buffers)
        if getattr(module, "takes_any_buffer", False):  # what its buffers are called is content, too
            own = (name.removeprefix(start) for name in weights if name.startswith(start))
            buffers = {**dict.fromkeys(leaf for leaf in own if "." not in leaf), **buffers}
        for leaf, buffer in buffers.items():
            name = start + leaf
            saved = weights.get(name)
            if isinstance(saved, Tensor) and (buffer is None or buffer.shape != saved.shape):
                resized[name] = (module, leaf)
    return resized


def _differences(here: Mapping[str, Any], saved: Mapping[str, Any], ignored: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in [*here, *(name for name in saved if name not in here)]:
        if name in ignored:
            continue
        ours, theirs = _shape_of(here, name), _shape_of(saved, name)
        if ours != theirs:
            lines.append(f"{name}: saved {theirs}, here {ours}")
    return lines


def _shape_of(state: Mapping[str, Any], name: str) -> str:
    if name not in state:
        return "absent"
    return str(tuple(state[name].shape)) if isinstance(state[name], Tensor) else type(state[name]).__name__


def _device_of(learner: nn.Module) -> torch.device:
    return next((parameter.device for parameter in learner.parameters()), torch.device("cpu"))


def _verified_payload(path: Path, data: bytes) -> bytes:
    header, newline, payload = data[:_HEADER_LIMIT].partition(b"\n")
    fields = header.split(b" ")
    if not newline or len(fields) != 4 or fields[0] != _MAGIC or not (fields[1].isdigit() and fields[3].isdigit()):
        raise CorruptCheckpointError(f"{path} is no metaicl checkpoint; it {_look(data)}")
    if int(fields[1]) != _FORMAT:
        raise IncompatibleCheckpointError(
            f"{path} has checkpoint format {int(fields[1])}; "
            f"this version reads format {_FORMAT}; update metaicl, or check the file"
        )
    payload = data[len(header) + 1 :]
    if len(payload) != int(fields[3]):
        raise CorruptCheckpointError(
            f"{path} must hold {int(fields[3])} bytes after its first line; got {len(payload)}"
        )
    if hashlib.sha256(payload).hexdigest().encode() != fields[2]:
        raise CorruptCheckpointError(f"{path} was changed after it was written: its SHA-256 does not fit its content")
    return payload


def _look(data: bytes) -> str:
    start = data[:_HEADER_LIMIT].lstrip().lower()
    if not data:
        return "is empty"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "looks like HTML, perhaps the error page of a download"
    if start.startswith(b"pk\x03\x04"):
        return "looks like a plain torch.save file; read it with torch.load(path, weights_only=True)"
    if start.startswith(_MAGIC[:8]):
        return "has a damaged first line"
    printable = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:_HEADER_LIMIT])
    return "looks like a text file" if printable else "starts with bytes of another format"


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif value is not None and not isinstance(value, (Tensor, bool, int, float, str, bytes)):
        raise TypeError(
            f"a checkpoint holds tensors, numbers, strings and plain containers; {place} is a {type(value).__name__}"
        )
