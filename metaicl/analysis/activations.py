"""What modules compute while a learner answers: collected through forward hooks that are always taken away again."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from metaicl.analysis.answers import batches, still
from metaicl.checks import check_choice
from metaicl.collation import concatenate
from metaicl.episode import Episode
from metaicl.learner import Learner
from metaicl.prefixes import predict_prefixes
from metaicl.training import place


@contextmanager
def recording(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of submodules; on leaving, also by an error, every hook is gone.

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
    handles = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                outputs[name].append(tensors[0].detach())

        return hook

    try:
        for name in outputs:
            handles.append(modules[name].register_forward_hook(keep(name)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
            of a causal model has seen t rows; "query" adapts to the support and answers the query.
        call: Which call of a module that is called more than once per batch; -1 is the last one. The bundled causal
            Transformers call their blocks once for the context (all but the last block), then once for the queries.
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
            with recording(learner, names) as outputs:
                if run == "prefixes":
                    predict_prefixes(learner, concatenate(part.support, part.query))
                else:
                    learner(part.support, part.query.x)
            for name, calls in outputs.items():
                parts.setdefault(name, []).append(_picked(name, calls, call, part.n_tasks))
    return {name: torch.cat(found).cpu() for name, found in parts.items()}


def _picked(name: str, calls: Sequence[Tensor], call: int, n_tasks: int) -> Tensor:
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
