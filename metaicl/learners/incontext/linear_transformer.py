"""Linear Transformers: in-context learners that can be gradient descent, weight for weight."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_count
from metaicl.episode import Examples
from metaicl.functional import categorical, gaussian, learned_positive
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.backbones import encode, encoder_dim, raw_or_encoded
from metaicl.nets.linear_attention import LinearAttentionStack
from metaicl.nets.rows import as_numbers
from metaicl.spec import TaskSpec


class TokenMoments(NamedTuple):
    """What linear attention knows of a support.

    Attributes:
        sums: Sum of e_i e_i^T over the tokens that enter each layer, (B, D, D) per layer.
        count: Real rows so far, long (B,).
    """

    sums: tuple[Tensor, ...]
    count: Tensor


class _LinearAttentionLearner(Learner[TokenMoments]):
    """What the two linear Transformers share: tokens, layers, construction, answer."""

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        depth: int = 1,
        loops: int = 1,
        heads: int = 1,
        key_size: int | None = None,
        scratch: int = 0,
        per_row: bool = True,
        init_variance: float = 0.002,
        clip: float | None = None,
    ) -> None:
        """Build the layers."""
        super().__init__(spec)
        self.encoder = raw_or_encoded(spec, encoder)
        self.declare_nets(self.encoder)
        self.x_size, self.y_size = encoder_dim(self.encoder, spec), spec.output_size
        self.scratch, self.per_row = check_count("scratch", scratch, 0), bool(per_row)
        self.stack = LinearAttentionStack(
            self.x_size + self.y_size + self.scratch,
            depth=depth, loops=loops, heads=heads, key_size=key_size, init_variance=init_variance, clip=clip,
        )  # fmt: skip
        self.start: Tensor
        self.register_buffer("start", torch.zeros(self.x_size, self.y_size))
        self.raw_scale = nn.Parameter(torch.zeros(self.y_size if spec.kind == "regression" else 1))

    def set_gradient_descent(self, *, lr: float, curvature: float = 0.0, start: Tensor | None = None) -> None:
        """Make every layer one step of gradient descent on 1/(2N) sum_i |x_i W - y_i|^2.

        That is what a query sees of a `LinearTransformer` of any depth and of a `CausalLinearTransformer` of one layer.
        In a deeper causal one, rows have residuals of their own: row i moves by a step on rows 1 to i as they stand,
        whose residuals know nothing of later rows, and that is not gradient descent on all rows.

        Args:
            lr: Step size; with `per_row` False it is that of the sum.
            curvature: gamma of GD++: inputs also move by -gamma/N X X^T x, which preconditions later steps.
            start: W_0 (x_size, y_size); None is zero, the only one for GD++, whose inputs change under W_0.

        Raises:
            ValueError: If the start has another shape or is not zero although there is curvature, or the layers have
                more than one head or keys smaller than a token.

        Reference:
            von Oswald et al. 2022, arXiv:2212.07677, Proposition 1 and section 4.2 (GD++).
        """
        start = torch.zeros_like(self.start) if start is None else start
        if start.shape != self.start.shape:
            raise ValueError(f"start must be (x_size, y_size) = {tuple(self.start.shape)}; got {tuple(start.shape)}")
        if curvature != 0 and bool((start != 0).any()):
            largest = float(start.detach().abs().max())
            raise ValueError(
                f"start must be None or zero with curvature != 0, which bends the inputs that W_0 is applied to; got "
                f"curvature {curvature} and a start up to {largest:.3g}. Hint: learn y - x W_0"
            )
        x, y = slice(self.x_size), slice(self.x_size, self.x_size + self.y_size)
        dim = self.x_size + self.y_size + self.scratch
        key_query, project_value = start.new_zeros(1, dim, dim), start.new_zeros(1, dim, dim)
        key_query[:, x, x].diagonal(dim1=-2, dim2=-1).fill_(1)
        project_value[:, y, x] = lr * start.mT
        project_value[:, y, y].diagonal(dim1=-2, dim2=-1).fill_(-lr)
        project_value[:, x, x].diagonal(dim1=-2, dim2=-1).fill_(-curvature)
        for index in range(len(self.stack)):
            self.stack[index].set_products(key_query, project_value)
        with torch.no_grad():
            self.start.copy_(start)

    def predict(self, state: TokenMoments, x: Tensor) -> Distribution:
        """Answer each query from the moments."""
        tokens, count = self._queries(x), self._divisor(state.count[:, None])
        for layer, moment in zip(self.stack.run(), state.sums, strict=True):
            tokens = self.stack.step(layer, tokens, layer.read(tokens, moment) / count)
        return self._answer(tokens)

    def _tokens(self, support: Examples) -> Tensor:
        """(x, y, 0) of each row (B, N, D), zero at masked rows: they add nothing to any moment."""
        check_support_labels(self.spec, support)
        x = encode(self.encoder, support.x)
        tokens = self._join(x, as_numbers(support.y, self.spec, x.dtype))
        return tokens if support.mask is None else tokens * support.mask[..., None]

    def _queries(self, x: Tensor) -> Tensor:
        """(x, -x W_0, 0) of each query (B, Q, D)."""
        x = encode(self.encoder, x)
        return self._join(x, -x @ self.start)

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y, x.new_zeros(*x.shape[:2], self.scratch)], -1)

    def _divisor(self, count: Tensor) -> Tensor:
        """What the change of tokens (B, T, D) is divided by, given the rows that each of them sees (B, T)."""
        return count.clamp(min=1)[..., None] if self.per_row else torch.ones_like(count)[..., None]

    def _answer(self, tokens: Tensor) -> Distribution:
        output, scale = -tokens[..., self.x_size : self.x_size + self.y_size], learned_positive(self.raw_scale)
        return gaussian(output, scale) if self.spec.kind == "regression" else categorical(output / scale)


class LinearTransformer(_LinearAttentionLearner):
    """A stack of linear self-attention over tokens (x, y); a query is the token (x, -x W_0) and reads the support.

    The answer is minus the y part of the query's token after the last layer. With the weights that
    `set_gradient_descent` sets, each layer is a step of gradient descent on the squared error of a linear model.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        depth: Layers.
        loops: Times the stack is run; `learner.stack.loops` may be changed later.
        heads: Attention heads.
        key_size: Size of keys, queries and values; None takes that of a token.
        scratch: More parts of each token, which start at zero and where layers can put what they like.
        per_row: Sums over the support are divided by its length, so that weights mean the same step at every length;
            False takes the sums as they are.
        init_variance: Weights start as N(0, init_variance / (depth fan-in)).
        clip: Bound on the parts of every token after a layer; None sets none.

    Reference:
        von Oswald et al. 2022, arXiv:2212.07677, sections 2 and 3: keys and values are those of the support alone.
        There the sums are taken as they are. Differs: the scale of the Gaussian answer is one learned number per
        output, and class logits have a learned temperature.
    """

    def adapt(self, support: Examples) -> TokenMoments:
        """Second moments of the support's tokens before every layer."""
        tokens, count = self._tokens(support), support.real.sum(1)
        sums = []
        for layer in self.stack.run():
            sums.append(tokens.mT @ tokens)
            change = layer.read(tokens, sums[-1]) / self._divisor(count[:, None])
            tokens = self.stack.step(layer, tokens, change)
        return TokenMoments(tuple(sums), count)


class CausalLinearTransformer(_LinearAttentionLearner):
    """The linear Transformer for streams: rows see themselves and earlier rows, and the support can grow.

    Its arguments are those of `LinearTransformer`. With the weights that `set_gradient_descent` sets, its first layer
    is a step of gradient descent; deeper ones are not, see there.

    Reference:
        von Oswald et al. 2023, arXiv:2309.05858, section 3. Differs: there one token is both the latest pair and the
        next query; here queries are tokens of their own, so that any input can be asked for.
    """

    traits = Traits(order_sensitive=True)

    def adapt(self, support: Examples) -> TokenMoments:
        """Second moments of the support's tokens before every layer."""
        return self.update(self._nothing(support), support)

    def update(self, state: TokenMoments, examples: Examples) -> TokenMoments:
        """The moments after `examples` too; nothing is computed again."""
        if examples.n_rows == 0:
            return state
        tokens, counts, sums = self._tokens(examples), self._counts(state, examples), []
        visible = _lower(examples, diagonal=0)
        for layer, before in zip(self.stack.run(), state.sums, strict=True):
            sums.append(before + tokens.mT @ tokens)
            change = layer.read(tokens, before) + layer.read_rows(tokens, tokens, visible)
            tokens = self.stack.step(layer, tokens, change / self._divisor(counts)) * examples.real[..., None]
        return TokenMoments(tuple(sums), counts[:, -1])

    def predict_prefixes(self, examples: Examples) -> Distribution:
        """Answer every row (B, N) from the rows before it, in one pass."""
        tokens, queries = self._tokens(examples), self._queries(examples.x)
        counts = self._counts(self._nothing(examples), examples)
        earlier = self._divisor(counts - examples.real.to(counts.dtype))
        upto, before = _lower(examples, diagonal=0), _lower(examples, diagonal=-1)
        for index, layer in enumerate(layers := list(self.stack.run())):
            change = layer.read_rows(queries, tokens, before) / earlier
            if index + 1 < len(layers):  # rows after the last layer are never read
                moved = layer.read_rows(tokens, tokens, upto) / self._divisor(counts)
                tokens = self.stack.step(layer, tokens, moved) * examples.real[..., None]
            queries = self.stack.step(layer, queries, change)  # after the rows: a layer's last call is for the queries
        return self._answer(queries)

    def _nothing(self, examples: Examples) -> TokenMoments:
        dim, n_layers = self.x_size + self.y_size + self.scratch, self.stack.loops * len(self.stack)
        like = self.raw_scale
        zero = like.new_zeros(examples.n_tasks, dim, dim)
        count = torch.zeros(examples.n_tasks, dtype=torch.long, device=like.device)
        return TokenMoments((zero,) * n_layers, count)

    def _counts(self, state: TokenMoments, examples: Examples) -> Tensor:
        """Real rows up to each row (B, N)."""
        return state.count[:, None] + examples.real.cumsum(1)


def _lower(examples: Examples, *, diagonal: int) -> Tensor:
    """What each row sees of the others: ones (N, N) at and below a diagonal."""
    n_rows = examples.n_rows
    return torch.ones(n_rows, n_rows, dtype=examples.x.dtype, device=examples.x.device).tril(diagonal)
