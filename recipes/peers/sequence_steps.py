"""A training step of the interleaved Transformer as users of Hugging Face and of JAX write it.

Each factory takes the learner whose weights and tokens it copies, and returns (gradient, update): both take an
episode; `gradient` gives the gradient of the squared error of every prefix by our parameter names and changes nothing,
`update` does a training step with Adam.
"""

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from peers.jax_adam import Steps, adam_steps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metaicl.episode import Episode
from metaicl.learners.incontext.sequence import InterleavedTransformer
from metaicl.meta_step import MetaStep
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.linear import Linear
from metaicl.nets.sequence.model import SequenceModel
from metaicl.objectives import prefix_squared_error, stream_of

_BLOCK = {  # names within a block, ours and GPT-2's; its linear layers keep their weights transposed
    "mixer_norm": "ln_1",
    "mixer.to_query_key_value": "attn.c_attn",
    "mixer.project": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.0": "mlp.c_fc",
    "mlp.2": "mlp.c_proj",
}
_NO_WORDS = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}


def our_steps(learner: InterleavedTransformer, *, compile: bool = False) -> Steps:
    """A MetaStep, as `meta_train` runs it."""
    step = MetaStep(copy.deepcopy(learner), prefix_squared_error, compile=compile)
    adam = torch.optim.Adam(step.parameters.values(), lr=1e-4, fused=True)

    def update(episode: Episode) -> None:
        for name, value in step(episode)[1].items():
            step.parameters[name].grad = value
        adam.step()

    return lambda episode: step(episode)[1], update


class Garg(nn.Module):
    """The reference implementation's model: GPT-2 on embeddings, with a linear map before and after."""

    def __init__(self, learner: InterleavedTransformer) -> None:
        """Copy the weights."""
        super().__init__()
        with _without_torchvision():
            from transformers import GPT2Config, GPT2Model

        model = learner.model
        assert isinstance(model, SequenceModel)
        assert model.positions is not None
        heads, (length, dim) = _heads(model), model.positions.weight.shape
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
        config = GPT2Config(n_positions=length, n_embd=dim, n_layer=len(model.blocks), n_head=heads, **off, **_NO_WORDS)
        self.tokens, self.head = copy.deepcopy(learner.tokens), _Mean(copy.deepcopy(learner.head))
        self.backbone = GPT2Model(config)
        self.names = {"model.positions.weight": ("wpe.weight", False)}
        for part in ("weight", "bias"):
            self.names[f"model.norm.{part}"] = (f"ln_f.{part}", False)
            for index in range(len(model.blocks)):
                for ours, theirs in _BLOCK.items():
                    turned = part == "weight" and not theirs.startswith("ln_")
                    self.names[f"model.blocks.{index}.{ours}.{part}"] = (f"h.{index}.{theirs}.{part}", turned)
        with torch.no_grad():
            for ours, (theirs, turned) in self.names.items():
                value = learner.get_parameter(ours)
                self.backbone.get_parameter(theirs).copy_(value.T if turned else value)

    def forward(self, episode: Episode) -> Tensor:
        """The mean squared error of every prefix."""
        rows = stream_of(episode)
        tokens, _ = self.tokens(rows)
        out = self.backbone(inputs_embeds=tokens).last_hidden_state
        return (self.head(out)[:, 0::2] - rows.y).square().mean()


def hugging_face_steps(learner: InterleavedTransformer) -> Steps:
    """GPT-2 of transformers fed the same embeddings."""
    model = Garg(learner)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def gradient(episode: Episode) -> dict[str, Tensor]:
        adam.zero_grad()
        model(episode).backward()
        found = {}
        for ours, (theirs, turned) in model.names.items():
            grad = model.backbone.get_parameter(theirs).grad
            assert grad is not None
            found[ours] = grad.T.clone() if turned else grad.clone()
        return found

    def update(episode: Episode) -> None:
        adam.zero_grad()
        model(episode).backward()
        adam.step()

    return gradient, update


def _heads(model: SequenceModel) -> int:
    attention = next(module for module in model.modules() if isinstance(module, CausalAttention))
    return attention.heads


@contextlib.contextmanager
def _without_torchvision() -> Iterator[None]:
    """Transformers imports torchvision where it finds it, which fails where that does not fit this torch."""
    known = "torchvision" in sys.modules
    if not known:
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's way of saying: not to be found
    try:
        yield
    finally:
        if not known:
            del sys.modules["torchvision"]


class _Mean(nn.Module):
    """The mean of the learner's Gaussian answer: the output of Garg's last linear map."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.linear = head.linear

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features).chunk(2, -1)[0]


def jax_steps(learner: InterleavedTransformer) -> Steps:
    """Jit of value and gradient with optax; buffers are donated."""
    import jax.numpy as jnp

    start = {name: jnp.array(value.detach().numpy()) for name, value in learner.named_parameters()}
    model = learner.model
    assert isinstance(model, SequenceModel)
    depth, heads = len(model.blocks), _heads(model)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return ((_in_jax(params, x, y, depth, heads) - y) ** 2).sum(-1).mean()

    def parts(episode: Episode) -> tuple[Tensor, ...]:
        rows = stream_of(episode)
        return rows.x, rows.y

    return adam_steps(start, loss, parts, lr=1e-4)


def _in_jax(params: Any, x: Any, y: Any, depth: int, heads: int) -> Any:
    """The predicted means (B, N, y_dim)."""
    import jax
    import jax.numpy as jnp

    def linear(name: str, h: Any) -> Any:
        return h @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(name: str, h: Any) -> Any:
        centered = h - h.mean(-1, keepdims=True)
        scaled = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]

    n_tasks, n_rows, _ = x.shape
    h = jnp.stack([linear("tokens.from_x", x), linear("tokens.from_y", y)], 2).reshape(n_tasks, 2 * n_rows, -1)
    h = h + params["model.positions.weight"][: 2 * n_rows]
    causal = jnp.tril(jnp.ones((2 * n_rows, 2 * n_rows), bool))
    for index in range(depth):
        name = f"model.blocks.{index}"
        parts = linear(f"{name}.mixer.to_query_key_value", norm(f"{name}.mixer_norm", h))
        query, key, value = jnp.split(parts.reshape(n_tasks, 2 * n_rows, 3 * heads, -1), 3, 2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), -1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(h.shape)
        h = h + linear(f"{name}.mixer.project", mixed)
        hidden = jax.nn.gelu(linear(f"{name}.mlp.0", norm(f"{name}.mlp_norm", h)), approximate=True)
        h = h + linear(f"{name}.mlp.2", hidden)
    return jnp.split(linear("head.linear", norm("model.norm", h[:, 0::2])), 2, -1)[0]


def count_operations(learner: InterleavedTransformer, episode: Episode) -> float:
    """Floating-point operations of a gradient; torch counts its own products, not those of oneDNN."""
    before, Linear.onednn = Linear.onednn, False
    try:
        with FlopCounterMode(display=False) as counter:
            prefix_squared_error(learner, episode).mean().backward()
    finally:
        Linear.onednn = before
    return float(counter.get_total_flops())
