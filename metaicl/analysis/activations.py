"""What modules compute while a learner answers: recorded on the way, and every trace of it is taken away again."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from metaicl.analysis.answers import batches, still
from metaicl.checks import check_choice
from metaicl.collation import concatenate
from metaicl.episode import Episode
from metaicl.learner import Learner, PredictsPrefixes
from metaicl.nets.sequence.mixer import Mixer
from metaicl.prefixes import take_prefix
from metaicl.training import place


@contextmanager
def recording(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of submodules; on leaving, also by an error, every hook is gone.

    What a `Mixer` answers to `peek` and `peek_prefixes` is recorded too: that is where queries pass it.

    Args:
        module: Whose submodules.
        names: As in `named_modules`; shell patterns such as "transformer.blocks.*" are allowed.

    Yields:
        The outputs of each matching module in the order of its calls, detached; of an output that is a container, its
        first tensor.

    Raises:
        ValueError: If a name matches no module.
    """
    modules = dict(module.named_modules())
    chosen = [name for pattern in names for name in _matching(pattern, modules)]
    outputs: dict[str, list[Tensor]] = {name: [] for name in dict.fromkeys(chosen)}

    def keep(name: str, output: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        if tensors:
            outputs[name].append(tensors[0].detach().clone())  # the next module may write over it: ReLU(inplace=True)

    with ExitStack() as undo:
        for name in outputs:
            _listen(modules[name], partial(keep, name), undo)
        yield outputs


def collect_activations(
    learner: Learner,
    episode: Episode,
    names: Sequence[str],
    *,
    run: str = "prefixes",
    call: int = -1,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Activations of named modules on the tasks of an episode, on the CPU; the learner is left as it was.

    Args:
        learner: Any learner.
        episode: B tasks.
        names: Modules, see `recording`.
        run: "prefixes" answers every row of the stream support then query from the rows before it, so that position t
            of a causal model has seen t rows; "query" adapts to the support and answers the query. A learner without
            `predict_prefixes` answers one prefix at a time, and the places of its one query are put side by side.
        call: Which call of a module that is called more than once per batch; -1 is the last one. The bundled learners
            pass context and queries through their layers one after the other, the queries last; those that loop do so
            in every loop.
        batch_size: Tasks together.
        seed: Of the learner's own randomness.

    Returns:
        For each module its output, batches joined along the first axis (B, ...).

    Raises:
        ValueError: If a name matches nothing, was not called, or its output does not start with the tasks of a batch.
    """
    check_choice("run", run, ("prefixes", "query"))
    parts: dict[str, list[Tensor]] = {}
    with still(learner, seed), torch.no_grad():
        for part in batches(episode, batch_size):
            part = place(part, learner)
            for name, value in _run(learner, part, names, run, call).items():
                parts.setdefault(name, []).append(value)
    return {name: torch.cat(found).cpu() for name, found in parts.items()}


def _listen(module: nn.Module, keep: Callable[[Any], None], undo: ExitStack) -> None:
    """Let `keep` have every output of a module, until `undo` is closed."""
    undo.callback(module.register_forward_hook(lambda _module, _inputs, output: keep(output)).remove)
    if not isinstance(module, Mixer):
        return
    for name in ("peek", "peek_prefixes"):
        before = module.__dict__.get(name)  # of a recording that surrounds this one
        undo.callback(_restore, module, name, before)
        object.__setattr__(module, name, _reporting(getattr(module, name), keep))


def _reporting(method: Callable[..., Any], keep: Callable[[Any], None]) -> Callable[..., Any]:
    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        output = method(*args, **options)
        keep(output)
        return output

    return call


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before


def _run(learner: Learner, part: Episode, names: Sequence[str], run: str, call: int) -> dict[str, Tensor]:
    """The picked output of every module on one batch."""
    if run == "query":
        with recording(learner, names) as outputs:
            learner(part.support, part.query.x)
        return _picked(outputs, call, part.n_tasks)
    stream = concatenate(part.support, part.query)
    if isinstance(learner, PredictsPrefixes):
        with recording(learner, names) as outputs:
            learner.predict_prefixes(stream)
        return _picked(outputs, call, part.n_tasks)
    columns: dict[str, list[Tensor]] = {}
    for t in range(stream.n_rows):
        with recording(learner, names) as outputs:
            learner(take_prefix(stream, t), stream.x[:, t : t + 1])
        for name, value in _picked(outputs, call, part.n_tasks).items():
            if value.ndim != 3 or value.shape[1] != 1:
                raise ValueError(
                    f"{type(learner).__name__} answers one prefix at a time, so the output of {name!r} must have shape "
                    f"(B, 1, H), with a place for the one query; got {tuple(value.shape)}"
                )
            columns.setdefault(name, []).append(value)
    return {name: torch.cat(found, 1) for name, found in columns.items()}


def _picked(outputs: Mapping[str, Sequence[Tensor]], call: int, n_tasks: int) -> dict[str, Tensor]:
    return {name: _pick(name, calls, call, n_tasks) for name, calls in outputs.items()}


def _pick(name: str, calls: Sequence[Tensor], call: int, n_tasks: int) -> Tensor:
    if not calls:
        raise ValueError(f"names must be of modules that an answer runs through; {name!r} was not called")
    if not -len(calls) <= call < len(calls):
        raise ValueError(f"call must name one of the {len(calls)} calls of {name!r}; got {call}")
    value = calls[call]
    if value.ndim < 2 or value.shape[0] != n_tasks:
        raise ValueError(
            f"the output of {name!r} must start with the tasks of a batch (B = {n_tasks}); got {tuple(value.shape)}"
        )
    return value


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    parts = pattern.split(".")  # a star stands for one level, so that "blocks.*" are the blocks and not what is in them
    found = [
        name
        for name in modules
        if name and len(parts) == name.count(".") + 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]
    if not found:
        raise ValueError(f"names must match modules of the learner; {pattern!r} matches none of {sorted(modules)[1:9]}")
    return found
