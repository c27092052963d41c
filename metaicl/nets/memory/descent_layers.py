"""Memories that learn by gradient descent, as layers: TTT, Titans and the Omega rule."""

import torch
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive
from metaicl.nets.memory.descent import Descent, Rates, descend, descend_chunked, start_descent
from metaicl.nets.memory.layers import FastWeightMixer, Written
from metaicl.nets.memory.recall import recall
from metaicl.nets.memory.state import FastWeights


class DescentMixer(FastWeightMixer):
    """A memory that takes gradient steps on the tokens it reads, from a learned start.

    The rates of a token are `max_step` times a sigmoid, and plain sigmoids for momentum, keep and importance; the kinds
    of gates it does not learn are fixed at no momentum, keep everything, importance one.

    Args:
        dim: D.
        rule: How to descend.
        gates: First values of the gates it learns, by name, in (0, 1): "step", and any of "momentum", "keep" and
            "importance".
        max_step: Largest rate of a step.
        hidden: Units of a memory with two layers and a GELU; None is a linear memory.
        options: Those of `FastWeightMixer`.

    Raises:
        ValueError: If the memory normalizes and keys and values differ in size.
    """

    def __init__(
        self,
        dim: int,
        *,
        rule: Descent,
        gates: dict[str, float],
        max_step: float,
        hidden: int | None = None,
        **options: int | bool | None,
    ) -> None:
        """Build the projections and the first memory."""
        super().__init__(dim, gates=len(gates), **options)  # type: ignore[arg-type]  # checked there
        if rule.norm and self.key_size != self.value_size:
            raise ValueError(
                f"a memory with norm adds keys to answers and needs keys and values of one size; got {self.key_size} "
                f"and {self.value_size}. Hint: norm=False, or key_dim and value_dim"
            )
        hidden = None if hidden is None else check_count("hidden", hidden)
        self.rule, self.gate_names, self.max_step = rule, tuple(gates), check_positive("max_step", max_step)
        self.first_gates = list(gates.values())
        self.reset_parameters()
        self.initial = nn.ParameterList(self._first_weights(hidden))

    def start(self, n_tasks: int, like: Tensor) -> FastWeights:
        """The learned first memory for every task."""
        weights = tuple(one.to(like).expand(n_tasks, *one.shape) for one in self.initial)
        return start_descent(weights, self.value_size, self.rule)

    def _first_weights(self, hidden: int | None) -> list[Tensor]:
        """Nothing is recalled at first; but normalization needs something to normalize."""
        random = torch.randn(self.heads, self.value_size, self.key_size if hidden is None else hidden)
        last = random * random.shape[-1] ** -0.5 if self.rule.norm else torch.zeros_like(random)
        if hidden is None:
            return [last]
        # this scale gives a unit key hidden units of length about one, so that steps below two are stable
        return [torch.randn(self.heads, hidden, self.key_size) * 2 * hidden**-0.5, last]

    def _write(self, queries: Tensor, written: Written, state: FastWeights, real: Tensor) -> tuple[Tensor, FastWeights]:
        keys, values, raw = written
        found = {name: torch.sigmoid(raw[..., i]) for i, name in enumerate(self.gate_names)}
        one = torch.ones_like(raw[..., 0])
        keep, importance = found.get("keep", one), found.get("importance", one)
        momentum = found.get("momentum", torch.zeros_like(one))
        rates = Rates(self.max_step * found["step"], momentum, keep, importance)
        run = descend if self.rule.batch == 1 else descend_chunked
        return run(queries, (keys, values, rates), state, self.rule, real)

    def _read(self, queries: Tensor, state: FastWeights) -> Tensor:
        return recall(state.weights, queries, norm=self.rule.norm)


class TestTimeTraining(DescentMixer):
    """TTT: one gradient step per token, the gradients of a mini-batch taken at its start.

    Args:
        dim: D.
        batch: Tokens in a mini-batch; None takes all gradients at the learned start, which with a linear memory is
            linear attention.
        hidden: Units of a memory with two layers (TTT-MLP); None is TTT-Linear.
        norm: As in `Titans`.
        max_step: Largest learning rate. The steps of a mini-batch add up, so that with unit keys 2 / batch is the most
            that can never diverge. None takes that (at most 1) where the memory is linear, without `norm` and read in
            mini-batches, and 1 elsewhere.
        options: Those of `FastWeightMixer`.

    Reference:
        Sun et al. 2024, arXiv:2407.04620, sections 2.3 to 2.7. Differs: the memory's normalization has no scale and
        shift of its own, and the loss has a factor 1/2.
    """

    __test__ = False  # pytest takes a class of this name for a test

    def __init__(
        self,
        dim: int,
        *,
        batch: int | None = 16,
        hidden: int | None = None,
        norm: bool | None = None,
        max_step: float | None = None,
        **options: int | bool | None,
    ) -> None:
        """Build the layer."""
        rule = Descent(batch=batch, norm=_norm(norm, hidden))
        if max_step is None:
            max_step = 1.0 if batch is None or hidden is not None or rule.norm else min(1.0, 2 / batch)
        super().__init__(dim, rule=rule, gates={"step": 0.5}, max_step=max_step, hidden=hidden, **options)
        self.order_free = batch is None


class Titans(DescentMixer):
    """A memory that learns by surprise with momentum, and forgets.

    The steps of a mini-batch of b tokens and of a window of c (1 for Titans) add up. Where all tokens have one unit
    key, a linear memory's answer m moves by S <- momentum S - step c m*, m <- keep m + S, with m* of up to b tokens
    ago. At b = 1 that is stable while step c < (1 + keep)(1 + momentum); at b > 1 without momentum while
    step b c <= 1 + keep^b, and with keep = 1 while step b c < (1 - momentum) min(2, 1 / momentum). A step of at most
    1 / (b c) is stable whatever keep is, with momentum up to 1/2, and with any at b = 1.

    Args:
        dim: D.
        hidden: Units of a memory with two layers; None is linear.
        norm: The memory answers with the key plus its normalized output, which needs keys and values of one size. None
            does so for two layers, whose steps would otherwise grow with the values until they diverge.
        batch: Tokens whose gradients are taken at one place; 1 is the rule itself, more is faster.
        max_step: Largest rate; None takes 1 / batch where the memory is linear, without `norm` and read in
            mini-batches, and 1 elsewhere. With longer keys the stable rates shrink with the square of their length.
        options: Those of `FastWeightMixer`.

    Reference:
        Behrouz et al. 2025, arXiv:2501.00663, section 3.1. Differs: the loss has a factor 1/2.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        norm: bool | None = None,
        batch: int | None = 1,
        max_step: float | None = None,
        **options: int | bool | None,
    ) -> None:
        """Build the layer."""
        rule = Descent(batch=batch, norm=_norm(norm, hidden))
        gates = {"step": 0.5, "momentum": 0.1, "keep": 0.99}
        max_step = (_stable_step(rule, hidden) or 1.0) if max_step is None else max_step
        super().__init__(dim, rule=rule, gates=gates, max_step=max_step, hidden=hidden, **options)


class Omega(DescentMixer):
    """A memory that learns from the last few tokens at every token, with momentum, and forgets.

    With Muon and several inner steps the rule is chaotic on long streams: a change of 1e-15 in one token, such as the
    rounding of tokens that are read one by one instead of together, has grown to .1 of the answers after 70 tokens.

    Args:
        dim: D.
        window: c, tokens in the loss.
        muon: Orthogonalize the steps (ATLAS); otherwise plain descent (OmegaNet).
        inner_steps: Steps per token.
        hidden: Units of a memory with two layers; None is linear.
        norm: As in `Titans`.
        batch: Tokens whose gradients are taken at one place; 1 is the rule itself, more is faster.
        max_step: Largest rate, of which a fifth is taken at first. None takes 1 / (batch window), as derived in
            `Titans`, and four fifths of it at first, where the memory is linear and without `norm` (a batch of None
            counts as one), and 1 elsewhere and for Muon, whose steps have a length of their own.
        options: Those of `FastWeightMixer`; `degree` gives the polynomial features.

    Reference:
        Behrouz et al. 2025, arXiv:2505.23735, equations 9 and 32. Differs: the importance of a token is its own, not
        one for each later token, and the loss has a factor 1/2.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 4,
        muon: bool = False,
        inner_steps: int = 1,
        hidden: int | None = None,
        norm: bool | None = None,
        batch: int | None = 1,
        max_step: float | None = None,
        **options: int | bool | None,
    ) -> None:
        """Build the layer."""
        rule = Descent(window=window, muon=muon, inner_steps=inner_steps, batch=batch, norm=_norm(norm, hidden))
        stable = _stable_step(rule, hidden) if max_step is None else None
        gates = {"step": 0.8 if stable else 0.2, "momentum": 0.1, "keep": 0.99, "importance": 0.9}
        max_step = (stable or 1.0) if max_step is None else max_step
        super().__init__(dim, rule=rule, gates=gates, max_step=max_step, hidden=hidden, **options)


def _norm(norm: bool | None, hidden: int | None) -> bool:
    return hidden is not None if norm is None else norm


def _stable_step(rule: Descent, hidden: int | None) -> float | None:
    """The largest rate that cannot diverge on unit keys, where one is known; see `Titans`."""
    if hidden is not None or rule.norm or rule.muon:
        return None
    return 1 / (rule.window * (rule.batch or 1))
