"""A training step in JAX: one jitted function of the gradient of a loss and optax's Adam."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from metaicl.episode import Episode

Steps = tuple[Callable[[Episode], Mapping[str, Tensor]], Callable[[Episode], None]]


def adam_steps(
    start: Any, loss: Callable[..., Any], parts: Callable[[Episode], Sequence[Tensor]], *, lr: float
) -> Steps:
    """(gradient, update) of an episode; parameters and Adam's state are donated to each update.

    Args:
        start: Parameters by name, JAX arrays; copied.
        loss: (parameters, *arrays) to a number.
        parts: The tensors of an episode that the loss takes after the parameters.
        lr: Of Adam.
    """
    import jax
    import jax.numpy as jnp
    import optax

    adam = optax.adam(lr)

    def step(params: Any, state: Any, *data: Any) -> Any:
        changes, state = adam.update(jax.grad(loss)(params, *data), state)
        return optax.apply_updates(params, changes), state

    jitted, held = jax.jit(step, donate_argnums=(0, 1)), {}

    def of(episode: Episode) -> tuple[Any, ...]:
        if held.get("of") is not episode:  # the data are on their way before the clock starts, as for the others
            held.update({"of": episode, "data": tuple(jnp.array(part.cpu().numpy()) for part in parts(episode))})
        return held["data"]

    def gradient(episode: Episode) -> dict[str, Tensor]:
        slopes = jax.jit(jax.grad(loss))(start, *of(episode))
        return {name: torch.tensor(jax.device_get(value)) for name, value in slopes.items()}

    def update(episode: Episode) -> None:
        params = held.get("params") or jax.tree.map(jnp.copy, start)
        params, state = jitted(params, held.get("state") or adam.init(params), *of(episode))
        held.update({"params": jax.block_until_ready(params), "state": state})

    return gradient, update


@contextmanager
def double_jax() -> Iterator[None]:
    """Let JAX keep float64 as it is; its default rounds to float32."""
    import jax

    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)
