"""One graph around a step, and the check that it computes what the eager step computes.

A wrong graph is silent: one that was traced with the module's own weights goes on using them, whatever it is given
(pytorch issue 97909). So no graph is trusted before it was compared with the eager step at two sets of weights.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Result = tuple[Tensor, Gradients]

_GRAPHS = 64  # of one step; torch stops at 8, which a range of n_shot exceeds


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(trainable, rest, episode)` as one graph for each shape; dropout draws what it draws eagerly."""

    def whole(trainable: Gradients, rest: Gradients, episode: Any) -> Any:
        return step(trainable, rest, episode)

    # Graphs are kept, and counted against a limit, by code object: each step gets its own.
    own = types.FunctionType(whole.__code__.replace(), whole.__globals__, whole.__name__, None, whole.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, options={"fallback_random": True})


def find_problem(
    graph: Callable[[], Result],
    eager: Callable[[], Result],
    learner: nn.Module,
    *,
    names: Iterable[str],
    tolerance: float,
    exact: Callable[[], Result] | None = None,
) -> str | None:
    """Why the graph cannot be trusted with what the two functions compute; None if it can.

    A difference beyond the tolerance is no problem if the graph is as close to `exact` as the eager step is: a gradient
    that is zero but for rounding, such as that of a bias before a normalization, differs by all of itself.

    Args:
        graph: Compiles where need be, and gives losses and gradients.
        eager: The same without the graph. What it raises is raised here: the learner itself is wrong then.
        learner: Whose weights both use; weights, buffers and random state are put back to the bit.
        names: Its parameters that are trained.
        tolerance: Largest relative difference.
        exact: The eager step in higher precision.
    """
    parameters = [learner.get_parameter(name) for name in names]
    with _same_buffers(learner) as changed:
        problem = _difference(graph, eager, exact, "current", tolerance)
        if problem is None:
            with _moved(parameters):
                problem = _difference(graph, eager, exact, "moved", tolerance)
    return f"a step changes its buffers {changed}" if changed else problem


def _difference(
    graph: Callable[[], Result],
    eager: Callable[[], Result],
    exact: Callable[[], Result] | None,
    weights: str,
    tolerance: float,
) -> str | None:
    with _same_randomness():
        expected = eager()
    try:
        with _same_randomness(), _compiling():
            found = graph()
    except Exception as error:  # a compiler can fail in any way; the eager step has just succeeded
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"torch.compile failed: {type(error).__name__}: {' '.join(lines[:2])[:200]}"
    finite = all(bool(value.isfinite().all()) for value in (expected[0], *expected[1].values()))
    gaps = list(_relative_gaps(found, expected)) if finite else []
    wrong = [gap for gap in gaps if not gap <= tolerance]  # NaN included
    if not wrong or (exact is not None and _only_rounding(found, expected, exact, tolerance)):
        return None
    return f"at the {weights} weights the compiled step differs from the eager one by {wrong[0]:.1e} (relative)"


def _only_rounding(found: Result, expected: Result, exact: Callable[[], Result], tolerance: float) -> bool:
    """Whether the graph is about as far from the exact step as the eager one, tensor by tensor."""
    try:
        with _same_randomness():
            truth = exact()
    except Exception:  # a learner that does not run in that precision
        return False
    # The graph may round a few times worse than the eager step, which sums in another order; but where that one itself
    # is a hundredfold off, nothing can be told any more, and the graph is not trusted.
    gaps = zip(_relative_gaps(found, truth), _relative_gaps(expected, truth), strict=True)
    return all(graph <= max(tolerance, 4 * eager) and eager <= 100 * tolerance for graph, eager in gaps)


def _relative_gaps(found: Result, expected: Result) -> Iterator[float]:
    """Largest difference of each tensor over its largest value; tiny gradients are measured against all of them."""
    yield float((found[0] - expected[0]).abs().max() / expected[0].abs().max().clamp(min=1e-6))
    sizes = {name: float(value.abs().max()) for name, value in expected[1].items() if value.numel()}
    largest = max(sizes.values(), default=0.0)
    for name, size in sizes.items():
        gap = float((found[1][name] - expected[1][name]).abs().max())
        yield gap / max(size, 1e-2 * largest, 1e-12)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about its own parts
        yield


@contextlib.contextmanager
def _same_randomness() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _same_buffers(learner: nn.Module) -> Iterator[list[str]]:
    """Put the buffers back after the context, and list those that it changed."""
    changed: list[str] = []
    before = {name: (buffer, buffer.clone()) for name, buffer in learner.named_buffers()}
    try:
        yield changed
    finally:
        for name, (buffer, value) in before.items():
            if not torch.equal(buffer, value):  # version counters do not see the running statistics of batch norm
                changed.append(name)
                buffer.copy_(value)


@contextlib.contextmanager
def _moved(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Weights a little elsewhere, and back to the bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.02).add_(1e-3)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
