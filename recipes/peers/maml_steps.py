"""A whole MAML update with Adam as users of learn2learn, higher, TorchOpt and JAX write it: a function of an episode.

Each factory takes (net, loss, lr, inner_steps) and returns (gradient, update): both take an episode; `gradient` gives
the meta-gradient by parameter name and changes nothing, `update` does a training step. The net is copied.
"""

import copy
from collections.abc import Callable
from typing import Any

import higher
import torch
from peers.jax_adam import Steps, adam_steps
from torch import Tensor, nn

from metaicl.episode import Episode
from metaicl.interop.learn2learn import import_learn2learn

Loss = Callable[[Tensor, Tensor], Tensor]


def learn2learn_steps(net: nn.Module, loss: Loss, lr: float, inner_steps: int) -> Steps:
    """A clone per task, and one backward pass per task."""
    maml = import_learn2learn().algorithms.MAML(copy.deepcopy(net), lr=lr)

    def task_loss(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        learner = maml.clone()
        for _ in range(inner_steps):
            learner.adapt(loss(learner(x), y))
        return loss(learner(new_x), new_y)

    return _loop(maml.module, task_loss)


def higher_steps(net: nn.Module, loss: Loss, lr: float, inner_steps: int) -> Steps:
    """A functional copy of net and optimizer per task."""
    own = copy.deepcopy(net)
    inner = torch.optim.SGD(own.parameters(), lr=lr)

    def task_loss(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        with higher.innerloop_ctx(own, inner, copy_initial_weights=False) as (fast, optimizer):
            for _ in range(inner_steps):
                optimizer.step(loss(fast(x), y))
            return loss(fast(new_x), new_y)

    return _loop(own, task_loss)


def torchopt_steps(net: nn.Module, loss: Loss, lr: float, inner_steps: int) -> Steps:
    """A differentiable optimizer that puts new weights into the net, which gets its old ones back after each task."""
    import torchopt

    own = copy.deepcopy(net)
    inner = torchopt.MetaSGD(own, lr=lr)  # type: ignore[attr-defined]  # the package re-exports it by a star

    def task_loss(x: Tensor, y: Tensor, new_x: Tensor, new_y: Tensor) -> Tensor:
        start, fresh = (torchopt.extract_state_dict(part, by="reference") for part in (own, inner))
        for _ in range(inner_steps):
            inner.step(loss(own(x), y))
        outer = loss(own(new_x), new_y)
        torchopt.recover_state_dict(own, start)
        torchopt.recover_state_dict(inner, fresh)
        return outer

    return _loop(own, task_loss)


def _loop(net: nn.Module, task_loss: Callable[..., Tensor]) -> Steps:
    parameters = dict(net.named_parameters())
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def backward(episode: Episode) -> None:
        adam.zero_grad()
        tasks = zip(episode.support.x, episode.support.y, episode.query.x, episode.query.y, strict=True)
        for task in tasks:
            (task_loss(*task) / episode.n_tasks).backward()

    def gradient(episode: Episode) -> dict[str, Tensor]:
        backward(episode)
        return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}

    def update(episode: Episode) -> None:
        backward(episode)
        adam.step()

    return gradient, update


def jax_steps(net: nn.Module, kind: str, lr: float, inner_steps: int) -> Steps:
    """Jit of the gradient of a mean over vmap, with optax; buffers are donated."""
    import jax
    import jax.numpy as jnp
    import optax

    forward = _in_jax(net)
    start = {name: jnp.array(value.detach().cpu().numpy()) for name, value in net.named_parameters()}

    def loss(params: Any, x: Any, y: Any) -> Any:
        out = forward(params, x)
        if kind == "regression":
            return ((out - y) ** 2).mean()
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean()

    def task_loss(params: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> Any:
        fast = params
        for _ in range(inner_steps):
            slopes = jax.grad(loss)(fast, x, y)
            fast = jax.tree.map(lambda value, slope: value - lr * slope, fast, slopes)
        return loss(fast, new_x, new_y)

    def mean_loss(params: Any, *data: Any) -> Any:
        return jax.vmap(task_loss, (None, 0, 0, 0, 0))(params, *data).mean()

    def parts(episode: Episode) -> tuple[Tensor, ...]:
        return episode.support.x, episode.support.y, episode.query.x, episode.query.y

    return adam_steps(start, mean_loss, parts, lr=1e-3)


def _in_jax(net: nn.Module) -> Callable[[Any, Any], Any]:
    """The forward pass of a chain of simple layers, in JAX."""
    import jax
    from jax import lax

    layers = [(name, layer) for name, layer in net.named_modules() if not list(layer.children())]

    def forward(params: Any, x: Any) -> Any:
        for name, layer in layers:
            weight, bias = params.get(f"{name}.weight"), params.get(f"{name}.bias")
            if isinstance(layer, nn.Linear):
                x = x @ weight.T + bias
            elif isinstance(layer, nn.Conv2d):
                x = lax.conv_general_dilated(x, weight, (1, 1), "SAME") + bias[:, None, None]
            elif isinstance(layer, nn.BatchNorm2d):
                mean, variance = (part((0, 2, 3), keepdims=True) for part in (x.mean, x.var))
                x = (x - mean) * lax.rsqrt(variance + layer.eps) * weight[:, None, None] + bias[:, None, None]
            elif isinstance(layer, nn.ReLU):
                x = jax.nn.relu(x)
            elif isinstance(layer, nn.MaxPool2d):
                x = lax.reduce_window(x, -jax.numpy.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
            elif isinstance(layer, nn.Flatten):
                x = x.reshape(len(x), -1)
            else:
                raise TypeError(f"no translation of {type(layer).__name__} into JAX")
        return x

    return forward
