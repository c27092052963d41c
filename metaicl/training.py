"""The outer loop: a generator that makes one update per meta-batch and yields what happened."""

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metaicl.checks import check_built_for, check_count, check_device, check_positive
from metaicl.compiled import Result, places_of_buffers
from metaicl.distributed import align, check_alike, check_unwrapped, divide, n_processes, rank
from metaicl.divergence import explain_inner_loops, name_problem
from metaicl.episode import Episode
from metaicl.learner import FollowsTraining, Learner
from metaicl.meta_step import MetaStep, accumulate
from metaicl.objectives import Objective, query_loss
from metaicl.task import EpisodeStream, TaskDistribution, check_is_learner, derive_seed


@dataclass(frozen=True)
class Step:
    """What one update did.

    Args:
        index: Which update, from 0; also the chunk of the episode stream it was made from.
        loss: Mean objective over the tasks of the meta-batch, before the update (nats per row for `query_loss`).
        grad_norm: Euclidean norm of the whole meta-gradient, before clipping.
        n_shot: Support rows per class in classification, per task in regression.
        learning_rate: Of the first parameter group, in this update.
        seconds: Wall-clock time of sampling and update.
    """

    index: int
    loss: float
    grad_norm: float
    n_shot: int
    learning_rate: float
    seconds: float


def outer_loop(
    learner: Learner,
    tasks: TaskDistribution,
    optimizer: Optimizer,
    *,
    steps: int,
    objective: Objective = query_loss,
    meta_batch_size: int = 25,
    micro_batch_size: int | None = None,
    n_shot: int | tuple[int, int] = 5,
    n_query: int = 15,
    seed: int = 0,
    start: int = 0,
    scheduler: LRScheduler | None = None,
    clip_norm: float | None = None,
    compile: bool = False,
    autocast: str | None = None,
    device: str | torch.device | None = None,
    workers: int = 0,
) -> Generator[Step, None, None]:
    """Train `learner` on `tasks`, one `Step` per update; arguments are checked at once, training starts with `next`.

    Update i uses chunk i of the episode stream (seed, "train"), so a loop that starts at k sees what an uninterrupted
    one saw. Dropout and the like draw from a seed derived from (seed, i): no global generator is seeded or consumed.
    The learner is in train mode during an update; between updates every module is in the mode its owner left it in.

    Where several processes train together (see `metaicl.distributed`), each takes its share of the tasks of every
    meta-batch, and all make the same update. Their number changes rounding, and which noise a learner draws.

    Args:
        learner: What to train.
        tasks: Where episodes come from.
        optimizer: Over parameters of the learner, all of them or some.
        steps: Updates in the whole training, those before `start` included.
        objective: (learner, episode) -> loss of each task (B,). Learners with `meta_gradients` are trained by these,
            and by what `WithAuxiliary` adds.
        meta_batch_size: B, tasks per update.
        micro_batch_size: Tasks in memory at a time; changes the meta-gradient by rounding only. None: all.
        n_shot: Support rows per class, or per task in regression; a pair (low, high) draws one value per update.
        n_query: Query rows, likewise.
        seed: Which stream of episodes.
        start: First update.
        scheduler: Stepped after each update.
        clip_norm: Largest Euclidean norm of the meta-gradient.
        compile: Try one compiled graph for the whole meta-step, see `MetaStep`.
        autocast: None or "bf16".
        device: Where to train; the learner is moved there. None: where the learner is.
        workers: Processes that sample ahead; they change nothing but the speed.

    Returns:
        A generator. Episodes are moved to the learner's device and floating dtype.

    Raises:
        TypeError: If an argument has the wrong type, or the learner is wrapped in DistributedDataParallel.
        ValueError: If an argument is out of range, the optimizer holds parameters of something else, or the tasks
            cannot give so many rows.
        RuntimeError: From the generator, when the processes do not start alike.
        FloatingPointError: From the generator, when a loss or a gradient is NaN or infinite. The update is not made,
            and the message names the task or the parameter, what the inner loop did step by step where there is one,
            and how to replay the episode.
    """
    check_unwrapped(learner)
    check_is_learner(learner)
    stream = EpisodeStream(tasks, seed=seed, split="train", n_shot=n_shot, n_query=n_query, chunk_size=meta_batch_size)
    check_built_for(type(learner).__name__, learner.spec, tasks.spec)
    if meta_batch_size < n_processes():
        raise ValueError(f"meta_batch_size must give each of {n_processes()} processes a task; got {meta_batch_size}")
    start = check_count("start", start, minimum=0)
    steps = check_count("steps", steps, minimum=start)
    workers = check_count("workers", workers, minimum=0)
    if micro_batch_size is not None:
        micro_batch_size = check_count("micro_batch_size", micro_batch_size)
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm)
    if device is not None:
        learner.to(check_device(device))
    _check_optimizer(optimizer, learner)
    if isinstance(n_shot, (tuple, list)):  # or else the first update is like all others
        stream.try_largest()
    meta_step = MetaStep(learner, objective, compile=compile, autocast=autocast)
    update = _Update(meta_step, optimizer, scheduler, stream, clip_norm=clip_norm, micro_batch_size=micro_batch_size)
    return _steps(update, range(start, steps), workers)


def _steps(update: "_Update", indices: range, workers: int) -> Generator[Step, None, None]:
    stream = update.stream
    followers = [module for module in update.meta_step.learner.modules() if isinstance(module, FollowsTraining)]
    began = time.perf_counter()
    for index, episode in zip(indices, stream.chunks(indices.start, indices.stop, workers=workers), strict=True):
        if index == indices.start:
            check_alike(update.meta_step.learner, episode)
        for module in followers:
            module.at(index / indices.stop)
        yield update(index, episode, began)
        began = time.perf_counter()


class _Update:
    """One update from one episode: meta-gradient, checks, clipping, optimizer, scheduler."""

    def __init__(
        self,
        meta_step: MetaStep,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        stream: EpisodeStream,
        *,
        clip_norm: float | None,
        micro_batch_size: int | None,
    ) -> None:
        self.meta_step, self.optimizer, self.scheduler, self.stream = meta_step, optimizer, scheduler, stream
        self.clip_norm, self.micro_batch_size = clip_norm, micro_batch_size
        self.buffers = [*places_of_buffers(meta_step.learner).values()]  # after the first update: those that it changed
        self.updates = 0
        self.device, self.dtype = device_of(meta_step.learner), dtype_of(meta_step.learner)

    def __call__(self, index: int, episode: Episode, began: float) -> Step:
        learner, optimizer = self.meta_step.learner, self.optimizer
        rate = float(optimizer.param_groups[0]["lr"])
        before = [(place[name], place[name].clone()) for place, name in self.buffers]
        own = (rank(),) if rank() else ()  # no two processes draw the same noise
        seed = derive_seed(self.stream.seed, "learner", index, *own)
        with training_mode(learner), isolated_randomness(seed, device_of(learner)):
            losses, gradients = divide(self._gradients, episode)
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        loss_value, norm_value = torch.stack([losses.mean().to(norm), norm]).tolist()  # the one synchronization
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            message = self._what_failed(index, episode, losses, gradients, seed)
            for (place, name), (buffer, value) in zip(self.buffers, before, strict=True):
                place[name] = buffer.copy_(value)
            raise FloatingPointError(message)
        align([place[name] for place, name in self.buffers])
        if self.updates == 0:
            self.buffers = [
                (place, name)
                for (place, name), (_, value) in zip(self.buffers, before, strict=True)
                if not torch.equal(place[name], value)
            ]
        self.updates += 1
        self._apply(gradients, norm)
        return Step(index, loss_value, norm_value, self._n_shot(episode), rate, time.perf_counter() - began)

    def _gradients(self, episode: Episode) -> Result:
        return accumulate(self.meta_step, place(episode, self.meta_step.learner), self.micro_batch_size)

    def _apply(self, gradients: Mapping[str, Tensor], norm: Tensor) -> None:
        parameters = self.meta_step.parameters
        for name, gradient in gradients.items():
            parameters[name].grad = _laid_out_like(parameters[name], gradient)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), self.clip_norm, norm)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        for parameter in parameters.values():
            parameter.grad = None

    def _what_failed(
        self, index: int, episode: Episode, losses: Tensor, gradients: Mapping[str, Tensor], seed: int
    ) -> str:
        learner = self.meta_step.learner
        with training_mode(learner), isolated_randomness(seed, device_of(learner)):
            inside = explain_inner_loops(self.meta_step, place(episode, learner), losses, self.micro_batch_size)
        problem = f"{name_problem(losses, gradients)} at step {index}, and the weights are those before it."
        return " ".join(part for part in (problem, inside, self._address(index)) if part)

    def _address(self, index: int) -> str:
        stream = self.stream
        low, high = stream.n_shot
        n_shot = low if low == high else (low, high)
        return (
            f"Replay it with EpisodeStream(tasks, seed={stream.seed}, split={stream.split!r}, n_shot={n_shot}, "
            f"n_query={stream.n_query}, chunk_size={stream.chunk_size})[{index}]"
        )

    def _n_shot(self, episode: Episode) -> int:
        return episode.support.n_rows // (self.stream.tasks.spec.n_way or 1)


def _laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of its parameter.

    Derivatives of transposed or broadcast weights come transposed or broadcast. `Tensor.backward` copies them into
    place; fused optimizers do not look at strides and would mix up the entries.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


@contextlib.contextmanager
def training_mode(learner: nn.Module, mode: bool = True) -> Iterator[None]:
    """The learner in train mode (or eval mode), and afterwards every module in the mode it had."""
    changing = [module for module in learner.modules() if module.training != mode]
    if changing:
        learner.train(mode)
    try:
        yield
    finally:
        for module in changing:
            module.training = not mode


@contextlib.contextmanager
def isolated_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded by `seed` inside, and as they were afterwards."""
    if device.type != "cuda":
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            yield
        return
    with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
        torch.default_generator.manual_seed(seed)
        torch.cuda.manual_seed(seed)
        yield


def device_of(learner: nn.Module) -> torch.device:
    """Where the learner's parameters (or, without any, its buffers) are; the CPU if it has neither."""
    leaf = next(learner.parameters(), None)
    leaf = next(learner.buffers(), None) if leaf is None else leaf
    return torch.device("cpu") if leaf is None else leaf.device


def dtype_of(learner: nn.Module) -> torch.dtype | None:
    """The dtype of the learner's floating parameters; None if it has none."""
    return next((parameter.dtype for parameter in learner.parameters() if parameter.is_floating_point()), None)


def place(episode: Episode, learner: nn.Module) -> Episode:
    """The episode on the learner's device, its floating fields in the dtype of the learner's floating parameters."""
    return episode.to(device_of(learner), dtype_of(learner))


def _check_optimizer(optimizer: Optimizer, learner: Learner) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in learner.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in own for parameter in held)
    if foreign:
        raise ValueError(
            f"optimizer must hold parameters of the learner only; {foreign} of its {len(held)} are of something else "
            f"(was the {type(learner).__name__} rebuilt after the optimizer?)"
        )
