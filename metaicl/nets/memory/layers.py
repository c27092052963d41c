"""Memories as layers of a causal model: one family with one interface and one state."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from metaicl.checks import check_count, check_positive
from metaicl.functional import solvable, unit_rows
from metaicl.nets.memory.delta import delta_rule_chunked, linear_attention_chunked
from metaicl.nets.memory.least_squares import Fit, least_squares_chunked, least_squares_recursive, ridge_start
from metaicl.nets.memory.recall import PolynomialFeatures, feature_count, recall
from metaicl.nets.memory.state import FastWeights
from metaicl.nets.sequence.mixer import Mixer

Written = tuple[Tensor, Tensor, Tensor]
"""Keys (B, H, T, K), values (B, H, T, V) and the raw gates of each token (B, H, T, gates)."""


class FastWeightMixer(Mixer[FastWeights]):
    """A layer that writes each token into a memory of fixed size per head, then reads it.

    Keys, values and queries are linear in the token, without a bias, so that a zero token writes nothing. A subclass
    says how a memory starts, is written and is read.

    Args:
        dim: D of the tokens.
        heads: H, memories side by side.
        key_dim: Size of keys and queries per head, before features are made of them; None takes D / H.
        value_dim: V, size of values per head; None takes D / H.
        unit_keys: Scale keys and queries to length one.
        degree: Keys and queries become all their monomials up to this degree (`PolynomialFeatures`), which raises
            how many keys a memory can hold apart from about K to about K^degree / degree!.
        gates: Numbers a rule takes from each token and head, beside key and value.

    Attributes:
        order_free: Whether the memory after some tokens is the same in whatever order they came.
        first_gates: What each kind of gate is at first, in (0, 1).
    """

    order_free = False
    first_gates: Sequence[float] = ()

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        unit_keys: bool = True,
        degree: int = 1,
        gates: int = 0,
    ) -> None:
        """Build the projections."""
        super().__init__()
        for name, value in (("dim", dim), ("heads", heads), ("degree", degree)):
            check_count(name, value)
        if dim % heads and (key_dim is None or value_dim is None):
            raise ValueError(f"heads must divide dim = {dim} where key_dim or value_dim is None; got {heads}")
        key_dim = check_count("key_dim", dim // heads if key_dim is None else key_dim)
        value_dim = check_count("value_dim", dim // heads if value_dim is None else value_dim)
        self.heads, self.unit_keys, self.degree = heads, unit_keys, degree
        self.key_size, self.value_size = feature_count(key_dim, degree), value_dim
        self.features = PolynomialFeatures(key_dim, degree)
        self.to_query = nn.Linear(dim, heads * key_dim, bias=False)
        self.to_key = nn.Linear(dim, heads * key_dim, bias=False)
        self.to_value = nn.Linear(dim, heads * value_dim, bias=False)
        self.to_gates = nn.Linear(dim, heads * gates) if gates else None
        self.project = nn.Linear(heads * value_dim, dim, bias=False)

    def reset_parameters(self) -> None:
        """The first gates; projections have their own making."""
        if self.to_gates is not None and self.first_gates:
            set_gates(self.to_gates, self.first_gates)

    @abstractmethod
    def _write(self, queries: Tensor, written: Written, state: FastWeights, real: Tensor) -> tuple[Tensor, FastWeights]:
        """Write tokens, real (B, 1, T), and read queries (B, H, T, K), query t after token t: (B, H, T, V)."""

    def _read(self, queries: Tensor, state: FastWeights) -> Tensor:
        """Read queries (B, H, Q, K) from a memory as it is: (B, H, Q, V)."""
        return recall(state.weights, queries)

    def forward(self, h: Tensor, state: FastWeights, real: Tensor | None = None) -> tuple[Tensor, FastWeights]:
        """Write and read; see `Mixer.forward`."""
        if h.shape[1] == 0:
            return h, state
        reads, state = self._write(self._rows(self.to_query, h), *self._tokens(h, state, real))
        return self._join(reads), state

    def peek(self, h: Tensor, state: FastWeights, *, own: bool = False) -> Tensor:
        """Read; with `own`, from a copy of the memory for each token, which that token is written into first."""
        if not own or h.shape[1] == 0:
            return self._join(self._read(self._rows(self.to_query, h), state))
        n_tasks, n_tokens = h.shape[:2]
        copies = pytree.tree_map(lambda leaf: leaf.repeat_interleave(n_tokens, 0), state)
        return self.forward(h.reshape(n_tasks * n_tokens, 1, -1), copies)[0].reshape(n_tasks, n_tokens, -1)

    def peek_prefixes(self, h: Tensor, context: Tensor, state: FastWeights, real: Tensor | None = None) -> Tensor:
        """Read once before and once after each token of the context but the last."""
        queries = self._rows(self.to_query, h)
        reads = self._read(queries[:, :, :1], state)
        if h.shape[1] > 1:
            real = None if real is None else real[:, :-1]
            rest, _ = self._write(queries[:, :, 1:], *self._tokens(context[:, :-1], state, real))
            reads = torch.cat([reads, rest], 2)
        return self._join(reads)

    def _tokens(self, h: Tensor, state: FastWeights, real: Tensor | None) -> tuple[Written, FastWeights, Tensor]:
        real = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device) if real is None else real
        h = torch.where(real[..., None], h, 0.0)
        gates = h.new_zeros(*h.shape[:2], 0) if self.to_gates is None else self.to_gates(h)
        written = (self._rows(self.to_key, h), self._split(self.to_value(h)), self._split(gates))
        return written, state, real[:, None]

    def _rows(self, projection: nn.Linear, h: Tensor) -> Tensor:
        """Keys or queries (B, H, T, K)."""
        rows = self._split(projection(h))
        rows = unit_rows(rows) if self.unit_keys else rows
        if self.degree == 1:
            return rows
        rows = self.features(rows)
        return unit_rows(rows) if self.unit_keys else rows

    def _split(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.heads, h.shape[-1] // self.heads)).transpose(1, 2)

    def _join(self, reads: Tensor) -> Tensor:
        return self.project(reads.transpose(1, 2).flatten(2))

    def _empty(self, n_tasks: int, like: Tensor) -> Tensor:
        return like.new_zeros(n_tasks, self.heads, self.value_size, self.key_size)


class LinearAttention(FastWeightMixer):
    """M_t = alpha_t M_{t-1} + v_t k_t^T: every token is written as it is.

    Args:
        dim: D.
        gate: Learn to forget: alpha is a sigmoid of the token, near one at first. None of it by default.
        options: Those of `FastWeightMixer`.

    Reference:
        Katharopoulos et al. 2020, arXiv:2006.16236; Yang et al. 2024, arXiv:2312.06635. Differs: no normalizer, one
        gate per head.
    """

    def __init__(self, dim: int, *, gate: bool = False, **options: int | bool | None) -> None:
        """Build the projections."""
        super().__init__(dim, gates=int(gate), **options)  # type: ignore[arg-type]  # checked there
        self.order_free = not gate
        self.first_gates = [0.99] if gate else []
        self.reset_parameters()

    def start(self, n_tasks: int, like: Tensor) -> FastWeights:
        """An empty memory."""
        return FastWeights((self._empty(n_tasks, like),))

    def _write(self, queries: Tensor, written: Written, state: FastWeights, real: Tensor) -> tuple[Tensor, FastWeights]:
        keys, values, gates = written
        decay = _log_gate(gates[..., 0], real) if gates.shape[-1] else None
        reads, memory = linear_attention_chunked(queries, keys, values, state.weights[0], decay)
        return reads, FastWeights((memory,))


class DeltaRule(FastWeightMixer):
    """M_t = alpha_t M_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T: what the key recalled is corrected.

    Args:
        dim: D.
        gate: Learn to forget: alpha is a sigmoid of the token, near one at first. None of it by default.
        options: Those of `FastWeightMixer`.

    Reference:
        Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484; Yang et al. 2025, arXiv:2412.06464
        (gated). beta is a sigmoid of the token. Differs: no short convolution and no output norm.
    """

    def __init__(self, dim: int, *, gate: bool = False, **options: int | bool | None) -> None:
        """Build the projections."""
        super().__init__(dim, gates=1 + int(gate), **options)  # type: ignore[arg-type]  # checked there
        self.first_gates = [0.9, 0.99][: 1 + int(gate)]
        self.reset_parameters()

    def start(self, n_tasks: int, like: Tensor) -> FastWeights:
        """An empty memory."""
        return FastWeights((self._empty(n_tasks, like),))

    def _write(self, queries: Tensor, written: Written, state: FastWeights, real: Tensor) -> tuple[Tensor, FastWeights]:
        keys, values, gates = written
        strength = torch.where(real, torch.sigmoid(gates[..., 0]), 0.0)
        decay = _log_gate(gates[..., 1], real) if gates.shape[-1] == 2 else None
        reads, memory = delta_rule_chunked(queries, keys, values, strength, state.weights[0], decay)
        return reads, FastWeights((memory,))


class Mesa(FastWeightMixer):
    """The exact least-squares map from the keys so far to their values, ridge-regularized by 1 / lambda.

    In half precision and under autocast it is computed in single precision. R is kept in double, so that tokens that
    come in pieces give what they give at once, at large lambda too.

    Args:
        dim: D.
        regularizer: lambda at first; each head learns its own, and it stays positive.
        gate: Learn to forget: gamma is a sigmoid of the token, near one at first. None of it by default.
        recursive: Run token by token with a backward that keeps few inverses, for long streams of small keys, instead
            of by matrix products over chunks. It is not for `compile=True`, and with a gate only for keys that keep
            reaching every direction while the past fades to the rounding of the dtype; chunks bear anything.
        options: Those of `FastWeightMixer`.

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, section 2 and appendix B. Differs: see `least_squares`.
    """

    def __init__(
        self,
        dim: int,
        *,
        regularizer: float = 1.0,
        gate: bool = False,
        recursive: bool = False,
        **options: int | bool | None,
    ) -> None:
        """Build the projections."""
        super().__init__(dim, gates=int(gate), **options)  # type: ignore[arg-type]  # checked there
        self.order_free, self.recursive = not gate, recursive
        self.regularizer = check_positive("regularizer", regularizer)
        self.log_regularizer = nn.Parameter(torch.empty(self.heads))
        self.first_gates = [0.99] if gate else []
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The first regularizer and the first gates."""
        super().reset_parameters()
        nn.init.constant_(self.log_regularizer, math.log(self.regularizer))

    def start(self, n_tasks: int, like: Tensor) -> FastWeights:
        """No map yet, and the inverse of the regularizer."""
        regularizer = self.log_regularizer.exp().double().expand(n_tasks, -1)
        fit = ridge_start(regularizer, self.key_size, self.value_size)
        return FastWeights((fit.weights.to(like),), (fit.inverse,))

    def _write(self, queries: Tensor, written: Written, state: FastWeights, real: Tensor) -> tuple[Tensor, FastWeights]:
        keys, values, gates = written
        decay = _log_gate(gates[..., 0], real) if gates.shape[-1] else None
        run: Callable[..., tuple[Tensor, Fit]] = least_squares_recursive if self.recursive else least_squares_chunked
        (weights,), (inverse,) = state.weights, state.inverse
        like = solvable(weights)
        wide = [one.to(like) for one in (queries, keys, values)]
        with torch.autocast(queries.device.type, enabled=False):
            reads, fit = run(*wide, Fit(like, inverse), None if decay is None else decay.to(like))
        return reads.to(queries), FastWeights((fit.weights.to(weights),), (fit.inverse,))


def set_gates(linear: nn.Linear, values: Sequence[float]) -> None:
    """Start each kind of gate at a value in (0, 1), the same for all heads and, at first, all tokens."""
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor(values).logit().repeat(linear.out_features // len(values)))


def _log_gate(raw: Tensor, real: Tensor) -> Tensor:
    """Logarithm of a gate (B, H, T); a token that is not real forgets nothing."""
    return torch.where(real, nn.functional.logsigmoid(raw), 0.0)
