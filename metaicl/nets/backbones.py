"""Plain encoders for vectors, images and tokens, and the sensible one for a spec."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from metaicl.checks import check_count
from metaicl.functional import unit_rows
from metaicl.nets.layout import channels_last
from metaicl.nets.norm_pool import run_layers
from metaicl.spec import TaskSpec


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Args:
        sizes: Layer widths, input first, output last.
        activation: Makes the nonlinearity.
        activate_last: Put one after the last layer too.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        activate_last: bool = False,
    ) -> None:
        """Build the layers with torch's default initialization."""
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [nn.Linear(n_in, n_out), activation()]
        super().__init__(*(layers if activate_last else layers[:-1]))


def group_norm(channels: int) -> nn.Module:
    """Group normalization with up to 8 groups of at least 4 channels.

    A group of one channel would blank an image that pooling has shrunk to one place.
    """
    groups = next(n for n in (8, 4, 2, 1) if n == 1 or (channels % n == 0 and channels // n >= 4))
    return nn.GroupNorm(groups, channels)


class Conv4(nn.Module):
    """The four-block convolutional encoder of few-shot learning: 3x3 convolution, norm, ReLU, 2x2 max-pooling.

    28 x 28 pixels become D = 4 * channels: Conv4-64 gives 256 features, Conv4-32 gives 128.

    Args:
        in_channels: Channels of the image.
        channels: Filters per block; 64 in Snell et al. 2017, 32 in Finn et al. 2017.
        norm: Makes a normalization layer for a number of channels. The papers use batch norm; the default is
            group norm, which looks at one row at a time.
        n_pools: Blocks that pool, the first ones; 2 in Sung et al. 2018 (`RelationNet`).
        flatten: Give vectors; False gives maps (rows, channels, height, width).

    Raises:
        ValueError: If `n_pools` is not 0 to 4.

    Reference:
        Vinyals et al. 2016, arXiv:1606.04080, section 4.1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        channels: int = 64,
        norm: Callable[[int], nn.Module] = group_norm,
        n_pools: int = 4,
        flatten: bool = True,
    ) -> None:
        """Build the blocks."""
        super().__init__()
        if check_count("n_pools", n_pools, minimum=0) > 4:
            raise ValueError(f"n_pools must be at most 4, the number of blocks; got {n_pools}")
        self.flatten = flatten
        blocks: list[nn.Module] = []
        for i, n_in in enumerate((in_channels, channels, channels, channels)):
            blocks += [nn.Conv2d(n_in, channels, 3, padding=1), norm(channels)]
            if i < n_pools:
                blocks.append(nn.MaxPool2d(2, ceil_mode=True))  # keeps images smaller than 16 pixels alive
            blocks.append(nn.ReLU())  # the same numbers and slopes as before pooling, for a quarter of the places
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (rows, channels, height, width) as (rows, D), or as maps."""
        maps = run_layers(self.blocks, channels_last(x, self))
        return maps.flatten(1) if self.flatten else maps


_WORD_GAIN = 10.0  # a word is met rarely, so its vector has to move further in an update than shared layers do
_LEAST_IMPORTANCE = 1e-8  # its logarithm is a parameter, and finite


class BagOfWords(nn.Module):
    """Weighted mean of word vectors, each word with a learned importance; no word order.

    Random word vectors make it a random projection of word counts, so words never met in training still tell
    texts apart; training moves importances from "all equal" towards something like inverse document frequency.

    Args:
        vocabulary: Token ids, padding (0) included.
        dim: Size of the vectors.
        importance: Start of the importances (vocabulary,), not negative; for instance inverse document frequencies of
            meta-training texts. Zero starts a word at next to nothing. None starts every word at one.
        vectors: Start of the word vectors (vocabulary, D), of any common scale; then `dim` is their D. None draws them.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 256,
        importance: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> None:
        """Draw the word vectors, or take those given."""
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, dim if vectors is None else vectors.shape[1])
        self.log_importance = nn.Embedding(vocabulary, 1)
        nn.init.normal_(self.vectors.weight, std=1 / _WORD_GAIN)
        nn.init.zeros_(self.log_importance.weight)
        with torch.no_grad():
            if importance is not None:
                self.log_importance.weight.copy_(importance.clamp(min=_LEAST_IMPORTANCE).log()[:, None] / _WORD_GAIN)
            if vectors is not None:
                self.vectors.weight.copy_(vectors / _WORD_GAIN)

    def states(self, tokens: Tensor) -> Tensor:
        """Each word's vector times its importance, (rows, T, D), zero at padding; see `HasTokenStates`."""
        return _WORD_GAIN * self.vectors(tokens) * self._importances(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed token ids (rows, T) as unit-variance vectors (rows, D); an empty text is the origin."""
        weight = unit_rows(self._importances(tokens)[..., 0])
        return (_WORD_GAIN * self.vectors(tokens) * weight[..., None]).sum(-2)

    def _importances(self, tokens: Tensor) -> Tensor:
        return (_WORD_GAIN * self.log_importance(tokens)).exp() * (tokens != 0)[..., None]


def build_encoder(spec: TaskSpec, *, dim: int | None = None) -> nn.Module:
    """A sensible encoder for the inputs of `spec`: (rows, *x_shape) -> (rows, D).

    Args:
        spec: An MLP for vectors, Conv4 for images, a bag of words for tokens.
        dim: Width of the MLP, filters of Conv4, size of the word vectors; None takes 64, and 256 for words, which need
            room to stay apart. D follows from it (see `encoder_dim`).
    """
    dim = check_count("dim", (256 if spec.x_kind == "tokens" else 64) if dim is None else dim)
    if spec.x_kind == "image":
        return Conv4(spec.x_shape[0], channels=dim)
    if spec.x_kind == "tokens":
        assert spec.vocabulary is not None  # TaskSpec holds it
        return BagOfWords(spec.vocabulary, dim=dim)
    return MLP((spec.x_shape[0], dim, dim))


def raw_or_encoded(spec: TaskSpec, encoder: nn.Module | None) -> nn.Module:
    """The encoder that was given; where none was, vectors are taken as they are and other inputs get one."""
    if encoder is not None:
        return encoder
    return nn.Identity() if spec.x_kind == "vector" else build_encoder(spec)


def encoder_dim(encoder: nn.Module, spec: TaskSpec) -> int:
    """D, the size of the encoder's output; see `encoder_shape`.

    Raises:
        TypeError: If the encoder gives anything but a tensor.
        ValueError: If it does not turn (rows, *x_shape) into (rows, D).
    """
    shape = encoder_shape(encoder, spec)
    if len(shape) != 1:
        raise ValueError(f"an encoder must turn {(2, *spec.x_shape)} into (2, D); got {(2, *shape)}")
    return shape[0]


def encoder_shape(encoder: nn.Module, spec: TaskSpec) -> tuple[int, ...]:
    """Shape of one embedded row, found by one forward pass on zeros that leaves the encoder as it was.

    Raises:
        TypeError: If the encoder gives anything but a tensor.
        ValueError: If it does not turn (rows, *x_shape) into (rows, ...).
    """
    parameter = next(encoder.parameters(), torch.empty(0))
    dtype = torch.long if spec.x_kind == "tokens" else parameter.dtype
    zeros = torch.zeros(2, *spec.x_shape, dtype=dtype, device=parameter.device)
    modes = {module: module.training for module in encoder.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in encoder.buffers()]
    encoder.eval()  # or zeros would enter the running statistics of a pretrained encoder
    try:
        with torch.random.fork_rng(), torch.no_grad():
            out = encoder(zeros)
    except RuntimeError as error:
        raise ValueError(f"an encoder must turn {tuple(zeros.shape)} into (2, D); got the error: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"an encoder must give a tensor (rows, D); got {type(out).__name__}. Wrap it in a module that returns the "
            "tensor alone, such as output[0] of a tuple"
        )
    if out.ndim < 2 or out.shape[0] != 2:
        raise ValueError(f"an encoder must turn {tuple(zeros.shape)} into (2, D); got {tuple(out.shape)}")
    return tuple(out.shape[1:])


def encoder_norm(encoder: nn.Module, size: int) -> nn.Module:
    """What is put behind an encoder of size D = `size`: an encoder's scale is its own arbitrary choice.

    Raw vectors keep their scale, which can carry information.
    """
    return nn.Identity() if isinstance(encoder, nn.Identity) else nn.LayerNorm(size)


def encode(encoder: nn.Module, x: Tensor) -> Tensor:
    """Apply an encoder of rows to x (B, N, *x_shape): (B, N, D)."""
    return encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class EncoderWithHead(nn.Sequential):
    """An encoder followed by a linear head; what gradient-based learners adapt.

    A classification head starts at zero: labels are arbitrary in every task, so no class should start ahead of another
    (Ye & Chao, 2022, arXiv:2106.16245, make the same point; without it MAML spends its first thousands of updates at
    chance). A regression head starts at torch's default.

    Args:
        encoder: (rows, *x_shape) -> (rows, D).
        spec: Gives D and the number of outputs.
    """

    def __init__(self, encoder: nn.Module, spec: TaskSpec) -> None:
        """Build the head on the encoder's output."""
        super().__init__()
        head = nn.Linear(encoder_dim(encoder, spec), spec.output_size)
        if spec.kind == "classification":
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.add_module("encoder", encoder)
        self.add_module("head", head)


def build_net(spec: TaskSpec, *, dim: int | None = None) -> nn.Module:
    """A sensible net for the inner loop, in two parts called `encoder` and `head`.

    Args:
        spec: Inputs and outputs. Vectors get two hidden layers (Finn et al. 2017), images Conv4, tokens a bag of words.
        dim: Width; None takes 40 for vectors, 32 filters for images, 64 for tokens.
    """
    width = dim or {"vector": 40, "image": 32, "tokens": 64}[spec.x_kind]
    if spec.x_kind == "vector":
        return EncoderWithHead(MLP((spec.x_shape[0], width, width), activate_last=True), spec)
    return EncoderWithHead(build_encoder(spec, dim=width), spec)
