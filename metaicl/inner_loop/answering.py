"""What a net answers under the fast weights of every task."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import vmap

from metaicl.inner_loop.calling import call_net
from metaicl.inner_loop.factored import Factors, FastWeights, NotFactorable, applied, formed, split
from metaicl.inner_loop.parameters import Params
from metaicl.inner_loop.perceptrons import answers
from metaicl.second_order import twice_differentiable


def call_tasks(net: nn.Module, fast: FastWeights, frozen: Params, x: Tensor) -> Tensor:
    """Outputs (B, Q, ...) of `net` under each task's fast weights, for inputs x (B, Q, ...).

    Args:
        net: Any module; left alone. Factors are added to its own weights.
        fast: Weights or their factors with leading axis B.
        frozen: Weights and buffers shared by all tasks.
        x: Inputs.
    """
    plain, factors = split(fast)
    if not factors:
        found = answers(net, plain, frozen, x, lambda fast, frozen: call_by_engine(net, fast, frozen, x))
        if found is not None:
            return found
    starts = {name: value for name, value in net.named_parameters() if name in factors}
    try:
        return _mapped(net, plain, factors, starts, frozen, x)
    except NotFactorable:  # a net that does something else in evaluation mode, say
        return call_tasks(net, formed(starts, fast), frozen, x)


def call_by_engine(net: nn.Module, fast: Params, frozen: Params, x: Tensor) -> Tensor:
    """`call_tasks` for weights that are formed, without kernels."""
    return _mapped(net, fast, {}, {}, frozen, x)


def _mapped(
    net: nn.Module, plain: Params, factors: Mapping[str, Factors], starts: Params, frozen: Params, x: Tensor
) -> Tensor:
    """The answers by `vmap`; factors are added to `starts`."""

    def one_task(weights: Params, factors: Mapping[str, Factors], inputs: Tensor) -> Tensor:
        with applied(starts, factors):
            return call_net(net, {**frozen, **starts, **weights}, (inputs,))

    with twice_differentiable():
        return vmap(one_task, randomness="different")(plain, factors, x)
