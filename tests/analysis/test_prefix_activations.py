"""Activations at each row are those its answer is made of, in every learner, and none of them knows its target."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from metaicl.analysis import probe_targets as target
from metaicl.analysis.activations import collect_activations, recording
from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.prefix_activations import prefix_activations
from metaicl.analysis.probe_report import probe_layers
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.learner import Learner
from metaicl.learners.incontext.linear_transformer import CausalLinearTransformer, LinearTransformer
from metaicl.learners.incontext.memory import BareMemory, MemoryLearner
from metaicl.learners.incontext.recurrent import RecurrentLearner
from metaicl.learners.incontext.sequence import InterleavedTransformer, LoopedTransformer, SequenceLearner
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.learners.reference.linear import GradientDescent
from metaicl.nets.memory.layers import LinearAttention, Mesa
from metaicl.nets.sequence.mixer import Mixer
from metaicl.prefixes import predict_prefixes
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=3, noise=0.5)
LOUD = LinearRegression(dim=3, noise=5.0)  # targets are noise: what has not read one cannot tell it
SPEC = TASKS.spec
N_SHOT = 5

Built = tuple[Learner, str, str, Callable[[Tensor], Tensor]]


def minus_y(tokens: Tensor) -> Tensor:
    return -tokens[..., 3:4]


def build(kind: str) -> Built:
    """A learner, its first layer, its last, and what turns activations of the last into its answers."""
    torch.manual_seed(0)
    learner: Any
    if kind == "causal Transformer":
        learner = CausalInContextTransformer(SPEC, dim=16, depth=2)
        first, last = "transformer.blocks.0", "transformer.blocks.1"
        return learner, first, last, lambda h: learner.head(learner.transformer.norm(h)).mean
    if kind == "set Transformer":
        learner = InContextTransformer(SPEC, dim=16, depth=2)
        first, last = "transformer.blocks.0", "transformer.blocks.1"
        return learner, first, last, lambda h: learner.head(learner.transformer.norm(h)).mean
    if kind == "interleaved":
        learner = InterleavedTransformer(SPEC, dim=16, depth=2)
        return learner, "model.blocks.0", "model.blocks.1", lambda h: learner.head(learner.model.norm(h)).mean
    if kind == "looped":
        learner = LoopedTransformer(SPEC, dim=16, loops=3, window=1)
        return learner, "model.body.blocks.0", "model.body", lambda h: learner.head(h).mean
    if kind == "memory":
        learner = MemoryLearner(SPEC, dim=16, depth=2)
        return learner, "model.blocks.0", "model.blocks.1", lambda h: learner.head(learner.model.norm(h)).mean
    if kind == "single memory of tokens":
        learner = SequenceLearner(SPEC, model=Mesa, dim=16)
        return learner, "tokens", "model", lambda h: learner.head(h).mean
    if kind == "bare memory":
        learner = BareMemory(SPEC, memory=Mesa)
        return learner, "memory.to_query", "memory", lambda h: learner.head(h).mean
    if kind == "linear":
        return LinearTransformer(SPEC, depth=2), "stack.layers.0", "stack.layers.1", minus_y
    assert kind == "causal linear"
    learner = CausalLinearTransformer(SPEC, depth=2, clip=100.0)
    return learner, "stack.layers.0", "stack.layers.1", minus_y


KINDS = (
    "causal Transformer",
    "set Transformer",
    "interleaved",
    "looped",
    "memory",
    "single memory of tokens",
    "bare memory",
    "linear",
    "causal linear",
)


def draw(n: int = 8, tasks: Any = TASKS) -> Any:
    return draw_episodes(tasks, n_shot=N_SHOT, n_query=1, start=0, stop=n, split="test", seed=1)


def single(stream: Examples) -> Examples:
    return stream.to(dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_is_made_of_the_activations(kind: str) -> None:
    """What is recorded at the last layer, read out as the learner reads it, is its answer at every row."""
    learner, _, last, read = build(kind)
    episode = draw()
    stream = single(concatenate(episode.support, episode.query))
    found = prefix_activations(learner, episode, [last])[last]
    with torch.no_grad():
        expected = predict_prefixes(learner, stream).mean
        spread = float(expected.std())  # of a linear Transformer before training it is small
        assert spread > 0
        assert torch.allclose(read(found), expected, rtol=0, atol=1e-4 * spread)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_knows_its_input_and_not_its_target(kind: str) -> None:
    learner, first, last, _ = build(kind)
    found = probe_layers(
        learner,
        LOUD,
        names=[first, last],
        targets={"x": lambda stream, latents: stream.x, "y": target.own_target},
        controls={},
        n_shot=N_SHOT,
        n_episodes=400,
    )
    assert all(one.mean > 0.95 for one in found.r2["x"]["trained"][first])
    for name in (first, last):
        assert all(one.mean < 0.1 for one in found.r2["y"]["trained"][name])


def gradient_descent(steps: int) -> target.Target:
    def answers(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
        return predict_prefixes(GradientDescent(SPEC, steps=steps, lr=0.2), stream).mean

    return answers


def test_each_layer_of_a_construction_holds_its_step_of_gradient_descent() -> None:
    """Two layers that are two steps by hand: the first holds the answer after one, the second that after two."""
    learner = LinearTransformer(SPEC, depth=2)
    learner.set_gradient_descent(lr=0.2)
    targets = {str(steps): gradient_descent(steps) for steps in (1, 2)}
    options: Any = {"controls": {}, "n_shot": N_SHOT, "n_episodes": 200, "names": ["stack.layers.*"]}
    found = probe_layers(learner, TASKS, targets=targets, **options)
    for steps, layer in (("1", "stack.layers.0"), ("2", "stack.layers.1")):
        assert all(one.mean > 0.9999 for one in found.r2[steps]["trained"][layer])
        assert all(one.mean < 0.2 for one in found.r2[steps]["shuffled"][layer])
    late = [found.r2["2"]["trained"][f"stack.layers.{i}"][-1].mean for i in (0, 1)]
    assert late[0] < 0.999 < late[1]


def test_a_causal_construction_holds_the_first_step_and_its_own_answer() -> None:
    learner = CausalLinearTransformer(SPEC, depth=2)
    learner.set_gradient_descent(lr=0.2)

    def own(stream: Examples, latents: Mapping[str, Tensor]) -> Tensor:
        return predict_prefixes(learner, single(stream)).mean.double().detach()

    targets: Any = {"first": gradient_descent(1), "own": own}
    options: Any = {"controls": {}, "n_shot": N_SHOT, "n_episodes": 200, "names": ["stack.layers.*"]}
    found = probe_layers(learner, TASKS, targets=targets, **options)
    assert all(one.mean > 0.9999 for one in found.r2["first"]["trained"]["stack.layers.0"])
    assert all(one.mean > 0.9999 for one in found.r2["own"]["trained"]["stack.layers.1"])
    assert found.r2["own"]["trained"]["stack.layers.0"][-1].mean < 0.999


def test_a_memory_of_raw_pairs_holds_one_step() -> None:
    """Linear attention over (x, y) with keys, queries and values as they are sums y_i x_i'x: a step of descent."""
    learner = BareMemory(SPEC, memory=partial(LinearAttention, unit_keys=False))
    with torch.no_grad():
        for layer in (learner.memory.to_key, learner.memory.to_query, learner.memory.to_value):
            torch.nn.init.eye_(layer.weight)
        learner.memory.to_key.weight[:, 3:] = 0
    options: Any = {"controls": {}, "n_shot": N_SHOT, "n_episodes": 200, "names": ["memory"]}
    found = probe_layers(learner, TASKS, targets={"step": gradient_descent(1)}, **options)
    assert all(one.mean > 0.9999 for one in found.r2["step"]["trained"]["memory"])


def test_loops_are_calls() -> None:
    """The first loop of a looped model is that of a model with one loop."""
    learner = LoopedTransformer(SPEC, dim=16, loops=3, window=1)
    name = "model.body"
    first, last = (prefix_activations(learner, draw(), [name], call=call)[name] for call in (0, -1))
    learner.loops = 1
    assert torch.allclose(prefix_activations(learner, draw(), [name])[name], first, atol=1e-6)
    assert not torch.allclose(first, last, atol=1e-3)


@pytest.mark.parametrize(
    ("learner", "name", "options"),
    [
        (
            CausalInContextTransformer(SPEC, dim=16, depth=2),
            "transformer.blocks.0",
            {"call": 0, "positions": slice(1, None)},
        ),
        (InterleavedTransformer(SPEC, dim=16, depth=2), "model.blocks.0", {"positions": slice(1, None, 2)}),
        (MemoryLearner(SPEC, dim=16, depth=2), "model.blocks.0", {"call": 0}),
        (LoopedTransformer(SPEC, dim=16, loops=2, window=1), "model.body.blocks.0", {"positions": slice(1, None, 2)}),
        (CausalLinearTransformer(SPEC, depth=2), "stack.layers.0", {"call": 0}),
        (RecurrentLearner(SPEC, dim=16), "inputs.0", {"call": 0}),
    ],
    ids=["causal Transformer", "interleaved", "memory", "looped", "causal linear", "recurrent"],
)
def test_activations_that_know_their_target_are_refused_by_name(learner: Learner, name: str, options: Any) -> None:
    """Tokens of the context hold their targets; they may be probed by those who say so."""
    common: Any = {"names": [name], "targets": {"y": target.own_target}, "controls": {}, "n_shot": N_SHOT}
    with pytest.raises(ValueError, match=rf"'{name}' of {type(learner).__name__} knows too much at position \d"):
        probe_layers(learner, LOUD, n_episodes=64, **common, **options)
    found = probe_layers(learner, LOUD, n_episodes=400, sees_target=True, **common, **options)
    assert all(one.mean > 0.9 for one in found.r2["y"]["trained"][name])


class Leaky(MemoryLearner):
    """Its embedding looks at `shift` rows further on: the stranger that no rule about bundled learners knows."""

    shift = 0

    def predict_prefixes(self, examples: Examples) -> Any:
        y = examples.y.roll(-self.shift, 1)
        context = self.embed(examples.x, 0.01 * y)
        return self.head(self.model(context, self.model.start(examples.n_tasks, context))[0])


@pytest.mark.parametrize("n_episodes", [3, 64])
def test_a_learner_that_leaks_is_refused_at_few_episodes_too(n_episodes: int) -> None:
    learner, episode = Leaky(SPEC, dim=16), draw(n_episodes)
    with pytest.raises(ValueError, match="knows too much"):
        prefix_activations(learner, episode, ["model.blocks.0"])
    prefix_activations(learner, episode, ["model.blocks.0"], sees_target=True)
    learner.shift = 1
    with pytest.raises(ValueError, match="knows too much"):
        prefix_activations(learner, episode, ["model.blocks.0"], sees_target=True)


def test_labels_are_guarded_too() -> None:
    tasks = GaussianClasses(dim=2, n_way=2)
    learner = CausalInContextTransformer(tasks.spec, dim=16, depth=2)
    names, episode = ["transformer.blocks.0"], draw_episodes(
        tasks, n_shot=3, n_query=1, start=0, stop=8, split="test", seed=1
    )  # fmt: skip
    n_rows = episode.support.n_rows + episode.query.n_rows
    assert prefix_activations(learner, episode, names)[names[0]].shape == (8, n_rows, 16)
    with pytest.raises(ValueError, match="knows too much"):
        prefix_activations(learner, episode, names, call=0, positions=slice(1, None))
    before = prefix_activations(learner, episode, names, call=0, positions=slice(0, -1))[names[0]]
    assert before.shape == (8, n_rows, 16)  # place t of the context has seen rows 0 .. t - 1


def test_positions_that_do_not_fit_are_refused() -> None:
    learner = InterleavedTransformer(SPEC, dim=16, depth=2)
    with pytest.raises(ValueError, match=r"'model.blocks.0' must have shape \(B, 6, H\)"):
        prefix_activations(learner, draw(), ["model.blocks.0"], positions=slice(None))
    with pytest.raises(ValueError, match=r"'model.blocks.1' must have shape \(B, 6, H\)"):
        prefix_activations(learner, draw(), ["model.blocks.1"], positions=slice(1, None, 2))
    chosen = prefix_activations(learner, draw(), ["model.blocks.0"], positions=slice(0, None, 2))
    found = prefix_activations(learner, draw(), ["model.blocks.*"])
    assert torch.equal(chosen["model.blocks.0"], found["model.blocks.0"])
    assert found["model.blocks.1"].shape == (8, 6, 16)


def test_recordings_of_mixers_leave_nothing_behind() -> None:
    learner = MemoryLearner(SPEC, dim=16, depth=2)
    mixers = [module for module in learner.modules() if isinstance(module, Mixer)]
    assert len(mixers) == 5

    def traces() -> int:
        return sum(len({"peek", "peek_prefixes"} & set(vars(one))) + len(one._forward_hooks) for one in mixers)

    stream = single(draw().support)

    def fail() -> None:
        with recording(learner, ["model.*", "model.blocks.*.mixer"]):
            assert traces() > 0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert traces() == 0
    with torch.no_grad(), recording(learner, ["model.blocks.*"]) as outer:
        with recording(learner, ["model.blocks.1"]) as inner:
            learner.predict_prefixes(stream)
        learner.predict_prefixes(stream)
    assert traces() == 0
    assert [len(outer[f"model.blocks.{i}"]) for i in (0, 1)] == [4, 2]  # context and queries; queries alone at the end
    assert torch.equal(inner["model.blocks.1"][0], outer["model.blocks.1"][0])


def test_queries_that_peek_are_recorded() -> None:
    learner = MemoryLearner(SPEC, dim=16, depth=2)
    episode = draw()
    found = collect_activations(learner, episode, ["model.blocks.1"], run="query")["model.blocks.1"]
    small = episode.to(dtype=torch.float32)
    with torch.no_grad():
        expected = learner(small.support, small.query.x).mean
        assert torch.allclose(learner.head(learner.model.norm(found)).mean, expected, atol=1e-6)
