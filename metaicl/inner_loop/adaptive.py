"""Inner optimizers that adapt their step to each weight: Adam, AdamW, RMSprop."""

from torch import Tensor

from metaicl.inner_loop.optimizers import InnerOptimizer, Precondition, Slots, safe_sqrt
from metaicl.inner_loop.rates import Rate, check_positive_rate, check_rate


class Adam(InnerOptimizer):
    """Adam.

    Its second derivative at a gradient of exactly zero is taken as if the running square were a constant there; the
    square root has none.

    Args:
        lr: Step size, > 0.
        betas: Decays of the running mean and the running square, in [0, 1).
        eps: Added to the root of the running square; near a zero gradient second derivatives grow like 1 / eps.
        weight_decay: Added to the gradient, times the weight.
        clip_norm: See `InnerOptimizer`.
        precondition: See `InnerOptimizer`.

    Raises:
        ValueError: If a setting is out of range.

    Reference:
        Kingma & Ba, 2015, arXiv:1412.6980, by the rule of `torch.optim.Adam`.
    """

    takes_complex = False
    decoupled: bool = False  # whether weight decay acts beside the gradient instead of in it

    def __init__(
        self,
        lr: Rate | float,
        *,
        betas: tuple[Rate | float, Rate | float] = (0.9, 0.999),
        eps: Rate | float = 1e-8,
        weight_decay: Rate | float = 0.0,
        clip_norm: float | None = None,
        precondition: Precondition | None = None,
    ) -> None:
        """Check the settings."""
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be a pair (beta1, beta2); got {betas!r}")
        super().__init__(
            clip_norm=clip_norm,
            precondition=precondition,
            lr=check_positive_rate("lr", lr),
            beta1=check_rate("betas[0]", betas[0], low=0, high=1),
            beta2=check_rate("betas[1]", betas[1], low=0, high=1),
            weight_decay=check_rate("weight_decay", weight_decay, low=0),
            eps=check_positive_rate("eps", eps),
        )

    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        """One step of one tensor."""
        lr, decay = self.rate("lr", name, step), self.rate("weight_decay", name, step)
        beta1, beta2 = self.rate("beta1", name, step), self.rate("beta2", name, step)
        if self.uses("weight_decay"):
            value, gradient = (value - lr * decay * value, gradient) if self.decoupled else (
                value, gradient + decay * value
            )  # fmt: skip
        mean = (1 - beta1) * gradient
        square = (1 - beta2) * gradient * gradient
        if slots:
            mean, square = beta1 * slots[0] + mean, beta2 * slots[1] + square
        unbiased1, unbiased2 = 1 - beta1 ** (step + 1), 1 - beta2 ** (step + 1)
        scale = safe_sqrt(square) / unbiased2**0.5 + self.rate("eps", name, step)
        return value - lr / unbiased1 * (mean / scale), (mean, square)


class AdamW(Adam):
    """Adam with decoupled weight decay.

    Args:
        lr: Step size, > 0.
        betas: Decays of the running mean and the running square, in [0, 1).
        eps: Added to the root of the running square.
        weight_decay: Each step takes off lr times this part of the weight.
        clip_norm: See `InnerOptimizer`.
        precondition: See `InnerOptimizer`.

    Raises:
        ValueError: If a setting is out of range.

    Reference:
        Loshchilov & Hutter, 2019, arXiv:1711.05101, by the rule of `torch.optim.AdamW`. Second derivatives as in
        `Adam`.
    """

    decoupled = True

    def __init__(
        self,
        lr: Rate | float,
        *,
        betas: tuple[Rate | float, Rate | float] = (0.9, 0.999),
        eps: Rate | float = 1e-8,
        weight_decay: Rate | float = 0.01,
        clip_norm: float | None = None,
        precondition: Precondition | None = None,
    ) -> None:
        """Check the settings."""
        super().__init__(
            lr, betas=betas, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, precondition=precondition
        )


class RMSprop(InnerOptimizer):
    """RMSprop.

    Args:
        lr: Step size, > 0.
        alpha: Decay of the running square, in [0, 1).
        eps: Added to the root of the running square.
        momentum: In [0, 1).
        weight_decay: Added to the gradient, times the weight.
        clip_norm: See `InnerOptimizer`.
        precondition: See `InnerOptimizer`.

    Raises:
        ValueError: If a setting is out of range.

    Reference:
        Tieleman & Hinton, 2012, Lecture 6.5, by the rule of `torch.optim.RMSprop` without its option `centered`.
        Second derivatives as in `Adam`.
    """

    takes_complex = False

    def __init__(
        self,
        lr: Rate | float,
        *,
        alpha: Rate | float = 0.99,
        eps: Rate | float = 1e-8,
        momentum: Rate | float = 0.0,
        weight_decay: Rate | float = 0.0,
        clip_norm: float | None = None,
        precondition: Precondition | None = None,
    ) -> None:
        """Check the settings."""
        super().__init__(
            clip_norm=clip_norm,
            precondition=precondition,
            lr=check_positive_rate("lr", lr),
            alpha=check_rate("alpha", alpha, low=0, high=1),
            momentum=check_rate("momentum", momentum, low=0, high=1),
            weight_decay=check_rate("weight_decay", weight_decay, low=0),
            eps=check_positive_rate("eps", eps),
        )

    def update(self, name: str, value: Tensor, gradient: Tensor, slots: Slots, step: int) -> tuple[Tensor, Slots]:
        """One step of one tensor."""
        if self.uses("weight_decay"):
            gradient = gradient + self.rate("weight_decay", name, step) * value
        alpha = self.rate("alpha", name, step)
        square = (1 - alpha) * gradient * gradient
        square = alpha * slots[0] + square if slots else square
        move = gradient / (safe_sqrt(square) + self.rate("eps", name, step))
        if not self.uses("momentum"):
            return value - self.rate("lr", name, step) * move, (square,)
        velocity = self.rate("momentum", name, step) * slots[1] + move if slots else move
        return value - self.rate("lr", name, step) * velocity, (square, velocity)
