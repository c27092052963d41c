"""Checkpoints that are whole or refused, and the weights of learners in them; see `metaicl.sealed_files`."""

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from metaicl.description import N_LISTED
from metaicl.learner import Learner
from metaicl.sealed_files import SealedFormat


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used."""


class CorruptCheckpointError(CheckpointError):
    """The file is not what was written, or never was a checkpoint."""


class IncompatibleCheckpointError(CheckpointError):
    """The file is whole but belongs to something else."""


_FORMAT = SealedFormat("checkpoint", 1, damaged=CorruptCheckpointError, incompatible=IncompatibleCheckpointError)


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write `content` atomically, with its checksum.

    Args:
        path: The file; its directory must exist.
        content: Tensors, numbers, strings and None in dicts, lists and tuples.

    Raises:
        TypeError: If something in `content` could not be read back safely; it is named by its place.
        OSError: If the file cannot be written; an older one then stands.
    """
    _FORMAT.write(path, content)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint, verified, with its tensors on the CPU. No code in the file is ever run.

    Raises:
        FileNotFoundError: If there is no such file.
        CorruptCheckpointError: If the file was truncated or changed, or is something else; the message says what.
        IncompatibleCheckpointError: If it has another format than this version writes.
    """
    return _FORMAT.read(path)


def save_learner(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Save the weights and buffers of a learner, to be loaded by `load_learner_weights`.

    The code that builds the learner is not saved: build it the same way, then load.

    Raises:
        TypeError: If it is no Learner.
        OSError: If the file cannot be written.
    """
    if not isinstance(learner, Learner):
        raise TypeError(f"learner must be a Learner; got {type(learner).__name__}")
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
            f"{path} was not written by save_learner; it holds {sorted(content)[:N_LISTED]}"
        )
    if content["learner"] != type(learner).__name__:
        raise IncompatibleCheckpointError(
            f"{path} holds the weights of a {content['learner']}; got a {type(learner).__name__} to load them into"
        )
    load_weights(learner, content["weights"], source=str(path))


def load_weights(learner: nn.Module, weights: Mapping[str, Any], *, source: str) -> None:
    """Load a state dict into a learner, all of it or nothing.

    Args:
        learner: Its parameters must have the names and shapes of `weights`; its buffers take the shapes found there,
            and so do submodules that only `prepare` makes (a module lists their names in `made_by_prepare`).
        weights: From `state_dict()`.
        source: Where they come from, for the message.

    Raises:
        IncompatibleCheckpointError: If names or shapes differ.
    """
    resized = _resized_buffers(learner, weights)
    differences = _differences(learner.state_dict(), weights, {*resized, *_made_by_prepare(learner, weights)})
    if differences:
        more = f"\n  and {len(differences) - N_LISTED} more" if len(differences) > N_LISTED else ""
        listed = "".join(f"\n  {line}" for line in differences[:N_LISTED])
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


def _made_by_prepare(learner: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """The weights, here and saved, of submodules that only `prepare` makes: their owner takes what was saved."""
    made = tuple(
        f"{prefix}.{name}.".removeprefix(".")
        for prefix, module in learner.named_modules()
        for name in getattr(module, "made_by_prepare", ())
    )
    return [name for name in (*learner.state_dict(), *weights) if name.startswith(made)]


def _differences(here: Mapping[str, Any], saved: Mapping[str, Any], ignored: Collection[str]) -> list[str]:
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
