"""Training in several processes: each takes its share of every meta-batch, and all make the same update.

Nothing wraps the learner. `outer_loop` and `meta_train` look for a process group, such as the one that `start` makes;
without one, or with one process, every function here leaves things as they are.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from metaicl.compiled import Result
from metaicl.episode import Episode

_Value = TypeVar("_Value")


@contextlib.contextmanager
def start() -> Iterator[None]:
    """The processes that `torchrun` launched, joined into one group: gloo for tensors on the CPU, nccl on CUDA.

    Each process sees a GPU of its own as "cuda". The group ends with the context, after an error too. In a script
    that was started without torchrun nothing happens, so that one script serves both.

    Raises:
        RuntimeError: If there is a group already.
    """
    if "RANK" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if distributed.is_initialized():
        raise RuntimeError("the processes are in a group already; start() makes the only one")
    distributed.init_process_group()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def n_processes() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0; the first one writes the files."""
    return distributed.get_rank() if n_processes() > 1 else 0


def share(n_tasks: int) -> range:
    """The tasks of this process: the ranks take contiguous ranges in turn, whose lengths differ by one at most."""
    return range(n_tasks * rank() // n_processes(), n_tasks * (rank() + 1) // n_processes())


def divide(compute: Callable[[Episode], Result], episode: Episode) -> Result:
    """`compute` on the tasks of this process, put together with what the others found.

    Args:
        compute: Losses of the tasks it is given, (B,) or their mean, and the gradient of their mean. A learner's own
            `meta_gradients` must be a mean over tasks too, as `accumulate` asks.
        episode: All B tasks, at least one for each process; the same in every process.

    Returns:
        The losses of all tasks in their order (B,), and the gradient of their mean: the same bits in every process.
    """
    if n_processes() == 1:
        return compute(episode)
    own = share(episode.n_tasks)
    losses, gradients = compute(episode[own.start : own.stop])
    placed = losses.new_zeros(episode.n_tasks)
    placed[own.start : own.stop] = losses
    weight = len(own) / episode.n_tasks
    losses, *values = add_up([placed, *(gradient * weight for gradient in gradients.values())])
    return losses, dict(zip(gradients, values, strict=True))


def add_up(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sum of every tensor over the processes, the same bits in all of them; one message for each dtype."""
    found = list(tensors)
    if n_processes() == 1:
        return found
    for dtype in {tensor.dtype: None for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[place].flatten() for place in places])
        distributed.all_reduce(flat)
        for place, piece in zip(places, flat.split([tensors[place].numel() for place in places]), strict=True):
            found[place] = piece.view(tensors[place].shape)
    return found


def largest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over the processes, sent through `device`."""
    if n_processes() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.tolist()


def from_first(value: _Value) -> _Value:
    """What the first process gives; the other ones wait for it, whatever they give."""
    if n_processes() == 1:
        return value
    sent = [value]
    distributed.broadcast_object_list(sent)
    return sent[0]


def align(buffers: Sequence[Tensor]) -> None:
    """Buffers as they are in the first process, in place: running statistics are those of its share, as in DDP."""
    if n_processes() > 1 and buffers:
        for buffer, value in zip(buffers, from_first([buffer.cpu() for buffer in buffers]), strict=True):
            buffer.copy_(value)


def check_alike(learner: nn.Module, episode: Episode) -> None:
    """Check that every process trains the same weights on the same episodes, or their updates would mean nothing.

    Raises:
        RuntimeError: If weights, buffers or the first episode differ; the message names them.
    """
    if n_processes() == 1:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            text = "torchrun launched several processes and each trains everything by itself"
            warnings.warn(f"{text}; join them by `with metaicl.distributed.start():`", RuntimeWarning, stacklevel=2)
        return
    tensors = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    here = {name: _digest(value) for name, value in tensors.items()} | {"the first episode": episode.fingerprint()}
    found: list[Any] = [None] * n_processes()
    distributed.all_gather_object(found, here)
    names = {name: None for other in found for name in other}
    wrong = [name for name in names if len({other.get(name) for other in found}) > 1]
    if wrong:
        raise RuntimeError(
            f"all {n_processes()} processes must start alike; they differ in {', '.join(wrong)}. "
            "Seed torch by the same number in each before building the learner, and give them the same seed and tasks"
        )


def check_unwrapped(learner: object) -> None:
    """Refuse a learner that is wrapped for several processes, or has a net that is.

    Raises:
        TypeError: If there is a DistributedDataParallel or a DataParallel.
    """
    for module in learner.modules() if isinstance(learner, nn.Module) else ():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise TypeError(
                f"a learner must not be wrapped, nor its nets; got a {type(module).__name__}. Through torch.func it "
                "trains on gradients that are silently not synchronized. Give the bare learner, train inside "
                "`with metaicl.distributed.start():` and launch the script with torchrun: meta-batches are split then"
            )


def _digest(value: Tensor) -> str:
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
