"""One graph around a step, and the check that it computes what the eager step computes.

A wrong graph is silent: one that was traced with the module's own weights goes on using them, whatever it is given
(pytorch issue 97909). So no graph is trusted before it was compared with the eager step at two sets of weights.
"""

import contextlib
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
Result = tuple[Tensor, Gradients]

_GRAPHS = 64  # of one step; torch stops at 8, which a range of n_shot exceeds
_SHAKES, _COARSE = 4, 0.1  # times that weights are moved by rounding; beyond this difference nothing can be told
_LIBRARIES = ("G['__import_torch_", "G['__import_metaicl_", "G['__builtins_dict_", "__import__(")


def compile_step(step: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`step(trainable, rest, episode)` as one graph for each shape; dropout draws what it draws eagerly.

    On a CPU convolutions keep the layout that they were traced with. The compiler would change theirs and leave that of
    all else alone, and to go from one to the other and back costs more than they gain.
    """

    def whole(trainable: Gradients, rest: Gradients, episode: Any) -> Any:
        return step(trainable, rest, episode)

    # Graphs are kept, and counted against a limit, by code object: each step gets its own.
    own = types.FunctionType(whole.__code__.replace(), whole.__globals__, whole.__name__, None, whole.__closure__)
    options = {
        "fallback_random": True,
        "guard_filter_fn": _guards_of_users,
        "layout_optimization": device.type != "cpu",
    }
    graph = torch.compile(own, fullgraph=True, dynamic=False, options=options)
    config: Any = torch._dynamo.config

    def call(*arguments: Any) -> Any:
        # By default no graph watches for hooks that a module gets later, and any call may make a graph.
        before, config.skip_nnmodule_hook_guards = config.skip_nnmodule_hook_guards, False
        try:
            return graph(*arguments)
        finally:
            config.skip_nnmodule_hook_guards = before

    return call


def find_problem(
    graph: Callable[[], Result],
    eager: Callable[[], Result],
    learner: nn.Module,
    *,
    names: Iterable[str],
    tolerance: float,
) -> str | None:
    """Why the graph cannot be trusted with what the two functions compute; None if it can.

    A gradient may differ by more than the tolerance where the eager step's own does when its weights move by eight
    times their rounding: by twice as much, and at most by a tenth. That of a bias before a normalization is zero but
    for rounding, and in a deep net with ReLU and max-pooling some unit among millions is always about to switch.
    Losses may not.

    Args:
        graph: Compiles where need be, and gives losses and gradients.
        eager: The same without the graph. What it raises is raised here: the learner itself is wrong then.
        learner: Whose weights both use; weights, buffers and random state are put back to the bit.
        names: Its parameters that are trained.
        tolerance: Largest relative difference.
    """
    parameters = [learner.get_parameter(name) for name in names]
    with _same_buffers(learner) as changed:
        problem = _difference(graph, eager, parameters, "current", tolerance)
        if problem is None:
            with _put_back(parameters):
                _move(parameters)
                problem = _difference(graph, eager, parameters, "moved", tolerance)
    return f"a step changes its buffers {changed}" if changed else problem


def name_failure(error: Exception) -> str:
    """What went wrong with a graph, in one line."""
    dynamo: Any = torch._dynamo
    if isinstance(error, dynamo.exc.FailOnRecompileLimitHit):
        return "it changes too often; something that it reads, such as an attribute, is another in every step"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"torch.compile failed: {type(error).__name__}: {' '.join(lines[:2])[:200]}"


def places_of_buffers(module: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each buffer stands, by name: a step may write into the tensor there, or put another one in its place."""
    owners = dict(module.named_modules())
    parts = {name: name.rpartition(".") for name, _ in module.named_buffers()}
    return {name: (owners[owner]._buffers, own) for name, (owner, _, own) in parts.items()}


def _guards_of_users(guards: Sequence[Any]) -> list[bool]:
    """All conditions of a graph but those on functions and constants of libraries, which nobody changes between calls.

    There are several hundred of these: to look at them takes a tenth of a small step. A learner's own attributes, and
    what a user's module defines, go on being watched.
    """
    return [not guard.name.startswith(_LIBRARIES) for guard in guards]


def _difference(
    graph: Callable[[], Result],
    eager: Callable[[], Result],
    parameters: list[nn.Parameter],
    weights: str,
    tolerance: float,
) -> str | None:
    with _same_randomness():
        expected = eager()
    try:
        with _same_randomness(), _compiling():
            found = graph()
    except Exception as error:  # a compiler can fail in any way; the eager step has just succeeded
        return name_failure(error)
    finite = all(bool(value.isfinite().all()) for value in (expected[0], *expected[1].values()))
    losses, *gradients = _relative_gaps(found, expected) if finite else [0.0]
    wrong = [gap for gap in (losses, *gradients) if not gap <= tolerance]  # NaN included
    if not wrong:
        return None
    if losses <= tolerance:
        bound = min(2 * _noise(eager, expected, parameters), _COARSE)
        if all(gap <= max(tolerance, bound) for gap in gradients):
            return None
    return f"at the {weights} weights the compiled step differs from the eager one by {wrong[0]:.1e} (relative)"


def _noise(eager: Callable[[], Result], expected: Result, parameters: list[nn.Parameter]) -> float:
    """Largest relative change of a gradient when weights move by rounding."""
    noise = 0.0
    for seed in range(_SHAKES):
        with _put_back(parameters), _same_randomness():
            _shake(parameters, torch.Generator().manual_seed(seed))
            noise = max(noise, *list(_relative_gaps(eager(), expected))[1:])
    return noise


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
    places = places_of_buffers(learner)
    before = {name: (place[own], place[own].clone()) for name, (place, own) in places.items()}
    try:
        yield changed
    finally:
        for name, (place, own) in places.items():
            buffer, value = before[name]
            # Version counters do not see the running statistics of batch norm.
            if not torch.equal(place[own], value):
                changed.append(name)
                place[own] = buffer
                buffer.copy_(value)


@contextlib.contextmanager
def _put_back(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Weights may move inside; after it they are what they were, to the bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def _move(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.02).add_(1e-3)


def _shake(parameters: list[nn.Parameter], generator: torch.Generator) -> None:
    """Move each weight by eight times the rounding of its precision, up or down."""
    with torch.no_grad():
        for parameter in parameters:
            signs = torch.rand(parameter.shape, generator=generator).sub_(0.5).sign_().to(parameter)
            parameter.addcmul_(parameter, signs, value=8 * torch.finfo(parameter.dtype).eps)
