"""A small honest learner, and one descendant for each way of breaking the contract."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    Distribution,
    Independent,
    LogNormal,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)

from metaicl.episode import Examples
from metaicl.functional import gaussian, masked_mean, positive
from metaicl.learner import Learner, Traits
from metaicl.learners.gradient.maml import MAML
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution

WIDTH = 24


class Honest(Learner[Any]):
    """A tiny neural process for regression on vectors; it keeps the contract."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        dim, out = spec.x_shape[0], spec.output_size
        self.encode = nn.Sequential(nn.Linear(dim + out, WIDTH), nn.Tanh())
        self.decode = nn.Sequential(nn.Linear(dim + WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out))
        self.raw_scale = nn.Parameter(torch.zeros(out))

    def rows(self, support: Examples) -> Tensor:
        return self.encode(torch.cat([support.x, support.y], -1))

    def adapt(self, support: Examples) -> Any:
        return masked_mean(self.rows(support), support.mask, 1)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        return self.decode(torch.cat([x, state[:, None].expand(-1, x.shape[1], -1)], -1))

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return gaussian(self.mean(state, x), positive(self.raw_scale))


class HonestStream(Honest):
    """The same with the optional methods of streams: the state is the sum of the codes and their number."""

    def adapt(self, support: Examples) -> Any:
        real = support.real[..., None].to(support.y.dtype)
        return (self.rows(support) * real).sum(1), real.sum(1)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        total, count = state
        return super().mean(total / count.clamp(min=1), x)

    def update(self, state: Any, examples: Examples) -> Any:
        total, count = self.adapt(examples)
        return state[0] + total, state[1] + count

    def merge(self, states: Sequence[Any]) -> Any:
        totals, counts = zip(*states, strict=True)
        return sum(totals), sum(counts)

    def predict_prefixes(self, examples: Examples) -> Distribution:
        real = examples.real[..., None].to(examples.y.dtype)
        codes = self.rows(examples) * real
        total, count = codes.cumsum(1) - codes, real.cumsum(1) - real
        inputs = torch.cat([examples.x, total / count.clamp(min=1)], -1)
        return gaussian(self.decode(inputs), positive(self.raw_scale))


class NoiseInTraining(Honest):
    """Draws its state in training, as latent neural processes do: nothing else reaches the scale of that noise."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.raw_noise = nn.Parameter(torch.zeros(()))

    def adapt(self, support: Examples) -> Any:
        state = super().adapt(support)
        return state + positive(self.raw_noise) * torch.randn_like(state) if self.training else state


class GrowingBuffer(Honest):
    """Remembers inputs of meta-training: how many is not known before `prepare`."""

    memory: Tensor

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("memory", torch.zeros(0, *spec.x_shape))

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        rows = tasks.sample(4, split="train", n_shot=2, n_query=2, generator=source).support.x
        self.memory = rows.flatten(0, 1).to(self.memory)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        return super().mean(state, x - self.memory.mean(0))


class ConstantBuffer(Honest):
    """Has a constant that no checkpoint keeps, as masks and frequencies are: it is made anew with the learner."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("frequencies", torch.arange(1.0, 1 + spec.x_shape[0]), persistent=False)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        return super().mean(state, x * self.get_buffer("frequencies"))


class PositiveAnswers(Honest):
    """Answers with a density of positive targets alone."""

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return Independent(LogNormal(self.mean(state, x), positive(self.raw_scale)), 1)


class DeclaredTransductive(Honest):
    """Declares more than it does, which is allowed."""

    traits = Traits(transductive=True, order_sensitive=True)


class MutatesWeights(Honest):
    def adapt(self, support: Examples) -> Any:
        with torch.no_grad():
            self.encode[0].weight.mul_(1 + 1e-12)
        return super().adapt(support)


class WritesGradients(Honest):
    def adapt(self, support: Examples) -> Any:
        with torch.enable_grad():
            self.raw_scale.square().sum().backward()
        return super().adapt(support)


class RunningStatistics(Honest):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("seen", torch.zeros(()))

    def adapt(self, support: Examples) -> Any:
        if self.training:
            self.seen += 1
        return super().adapt(support)


class WritesIntoEpisode(Honest):
    def adapt(self, support: Examples) -> Any:
        support.x.clamp_(-0.1, 0.1)
        return super().adapt(support)


class IgnoresSupport(Honest):
    def adapt(self, support: Examples) -> Any:
        return 0 * super().adapt(support)


class DeniesItsSupport(Honest):
    traits = Traits(reads_support=False)


class PeeksAtQueries(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        return super().predict(state, x - x.mean(1, keepdim=True))


class DeclaredPeeker(PeeksAtQueries):
    traits = Traits(transductive=True)


class MixesEpisodes(Honest):
    def adapt(self, support: Examples) -> Any:
        state = super().adapt(support)
        return state - 0.5 * state.mean(0)


class ConsumesGlobalRng(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        torch.rand(1)
        return super().predict(state, x)


class SeedsGlobalRng(Honest):
    def adapt(self, support: Examples) -> Any:
        torch.manual_seed(3)
        return super().adapt(support)


class SeedsWhileTraining(Honest):
    def adapt(self, support: Examples) -> Any:
        if self.training:
            torch.manual_seed(3)
        return super().adapt(support)


class DrawsElsewhereWhileTraining(Honest):
    def mean(self, state: Any, x: Tensor) -> Tensor:
        noise = random.gauss() if self.training else 0.0
        return super().mean(state, x) + noise


class NotFinite(Honest):
    def mean(self, state: Any, x: Tensor) -> Tensor:
        return super().mean(state, x).clamp(max=0).sqrt()


class WrongShape(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        return gaussian(self.mean(state, x).mT, positive(self.raw_scale))


class WithoutMean(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        bent = [SigmoidTransform(), SigmoidTransform().inv, AffineTransform(self.mean(state, x), 1.0)]
        return Independent(TransformedDistribution(Normal(torch.zeros_like(x[..., :1]), 1.0), bent), 1)


class ReturnsTensor(Honest):
    def predict(self, state: Any, x: Tensor) -> Any:
        return self.mean(state, x)


class DeadParameter(Honest):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.unused = nn.Parameter(torch.ones(3))


class DetachedState(Honest):
    def adapt(self, support: Examples) -> Any:
        return super().adapt(support).detach()


class DoublesTheGradient(Honest):
    """The right answers, but in a meta-batch the gradient of the state counts twice."""

    def adapt(self, support: Examples) -> Any:
        state = super().adapt(support)
        return state if len(support) == 1 else state + (state - state.detach())


class HalfDetachedState(Honest):
    """The gradient arrives everywhere, and half of what flows through the state is missing."""

    def adapt(self, support: Examples) -> Any:
        state = super().adapt(support)
        return (state + state.detach()) / 2


class _SineOnce(torch.autograd.Function):
    """The sine, whose backward leaves the graph; torch.func does not heed `once_differentiable`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _SineOnce.apply(x)


class OnceDifferentiable(MAML):
    """An inner loop through a function that can be differentiated once."""

    def __init__(self, spec: TaskSpec) -> None:
        dim, out = spec.x_shape[0], spec.output_size
        super().__init__(spec, net=nn.Sequential(nn.Linear(dim, WIDTH), _Sine(), nn.Linear(WIDTH, out)), inner_lr=0.1)


class DeclaredApproximate(OnceDifferentiable):
    """The same, and says so."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.declare_approximate()


class TrainableReference(Honest):
    traits = Traits(trainable=False)


class NonDeterministic(Honest):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.calls = 0

    def predict(self, state: Any, x: Tensor) -> Distribution:
        self.calls += 1
        return gaussian(self.mean(state, x) + 0.01 * self.calls, positive(self.raw_scale))


class NeedsGradMode(Honest):
    def adapt(self, support: Examples) -> Any:
        loss = self.raw_scale.square().sum()
        (step,) = torch.autograd.grad(loss, [self.raw_scale], create_graph=True)
        return super().adapt(support) - step.sum()


class OrderSensitive(Honest):
    def adapt(self, support: Examples) -> Any:
        place = support.real.cumsum(1)[..., None]
        return masked_mean(self.rows(support) / place.clamp(min=1), support.mask, 1)


class IgnoresMask(Honest):
    def adapt(self, support: Examples) -> Any:
        return self.rows(support).mean(1)


class NeedsNoMask(Honest):
    def adapt(self, support: Examples) -> Any:
        state = super().adapt(support)
        return state if support.mask is None else state + 0.01


class KeepsState(Honest):
    def adapt(self, support: Examples) -> Any:
        self.state = super().adapt(support)
        return torch.zeros(len(support))

    def predict(self, state: Any, x: Tensor) -> Distribution:
        return super().predict(self.state, x)


class KeepsAnAverage(Honest):
    """A running mean of the targets in training, in a plain number."""

    running = 0.0

    def adapt(self, support: Examples) -> Any:
        if self.training:
            self.running += 0.1 * (float(support.y.detach().mean()) - self.running)
        return super().adapt(support)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        return super().mean(state, x) + self.running


class FitsAtFirstCall(Honest):
    """The scale of the first inputs that it meets."""

    scale = None

    def adapt(self, support: Examples) -> Any:
        if self.scale is None:
            self.scale = float(support.x.abs().mean())
        return super().adapt(support)

    def mean(self, state: Any, x: Tensor) -> Tensor:
        return super().mean(state, x / self.scale)


class AnnealsItsPenalty(Honest):
    """The answers are always the same; the training loss knows how often it was asked for."""

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.asked = 0

    def penalty(self, state: Any) -> Tensor:
        self.asked += 1
        return state.square().mean(1) / self.asked


class Float32Only(Honest):
    def rows(self, support: Examples) -> Tensor:
        return self.encode(torch.cat([support.x, support.y], -1).float())


class RoundsToFloat32(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        mean, scale = self.mean(state, x), positive(self.raw_scale)
        return gaussian(mean.float(), scale.float())


class FlipsMode(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        self.decode.train(not self.decode.training)
        return super().predict(state, x)


class HiddenBuffer(Honest):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.register_buffer("hidden", torch.randn(WIDTH), persistent=False)

    def adapt(self, support: Examples) -> Any:
        return super().adapt(support) + self.get_buffer("hidden")


class HiddenTensor(Honest):
    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        self.hidden = [torch.randn(WIDTH)]

    def adapt(self, support: Examples) -> Any:
        return super().adapt(support) + self.hidden[0].to(support.y)


class FixedSizes(Honest):
    def predict(self, state: Any, x: Tensor) -> Distribution:
        if x.shape[1] == 1:
            return gaussian(self.mean(state, x.squeeze()), positive(self.raw_scale))
        return super().predict(state, x)


class DividesByOneLess(Honest):
    """The scale of the answers is the unbiased spread of the targets, which a single row does not have."""

    def adapt(self, support: Examples) -> Any:
        real = support.real[..., None].to(support.y.dtype)
        mean = masked_mean(support.y, support.mask, 1)
        spread = ((support.y - mean[:, None]).square() * real).sum(1) / (real.sum(1) - 1)
        return super().adapt(support), spread

    def predict(self, state: Any, x: Tensor) -> Distribution:
        codes, spread = state
        return gaussian(self.mean(codes, x), positive(self.raw_scale + spread[:, None]))


class ForgetsInUpdate(HonestStream):
    def update(self, state: Any, examples: Examples) -> Any:
        return self.adapt(examples)


class MergesWithoutWeights(HonestStream):
    """Averages what was learned, whoever has seen how many rows."""

    def merge(self, states: Sequence[Any]) -> Any:
        means = [total / count.clamp(min=1) for total, count in states]
        return sum(means), torch.full_like(states[0][1], len(states))


class PrefixesSeeTheAnswer(HonestStream):
    def predict_prefixes(self, examples: Examples) -> Distribution:
        real = examples.real[..., None].to(examples.y.dtype)
        codes = (self.rows(examples) * real).cumsum(1)
        inputs = torch.cat([examples.x, codes / real.cumsum(1).clamp(min=1)], -1)
        return gaussian(self.decode(inputs), positive(self.raw_scale))


class PrefixesCountMaskedRows(HonestStream):
    def predict_prefixes(self, examples: Examples) -> Distribution:
        return super().predict_prefixes(Examples(examples.x, examples.y))


class UpdatesWithMaskedRows(HonestStream):
    def update(self, state: Any, examples: Examples) -> Any:
        return super().update(state, Examples(examples.x, examples.y))


class UpdatesInPlace(HonestStream):
    def update(self, state: Any, examples: Examples) -> Any:
        for old, new in zip(state, self.adapt(examples), strict=True):
            old.add_(new.detach())
        return state


class ShortPrefixes(HonestStream):
    def predict_prefixes(self, examples: Examples) -> Distribution:
        return super().predict_prefixes(examples.rows(slice(1, None)))


class ClimbsTheLoss(Honest):
    def meta_gradients(self, episode: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = query_loss(self, episode).mean()
        named = dict(self.named_parameters())
        found = torch.autograd.grad(loss, list(named.values()))
        return loss.detach(), {name: -value for name, value in zip(named, found, strict=True)}


class ReadsTestTasks(Honest):
    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        tasks.sample(4, split="test", n_shot=2, n_query=2, generator=source)


class StudiesItsTasks(Honest):
    """It keeps the contract: what tasks say of themselves may be read while it is prepared."""

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        assert tasks.identity == ("weights",)
        assert list(tasks.references()) == ["Bayes"]
