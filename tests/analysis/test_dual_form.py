"""Linear attention is two matrices, one of them a gradient step; and what it is compared with in softmax models."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.dual_form import dual_form
from metaicl.analysis.finetuning import compare_with_finetuning
from metaicl.analysis.finetuning_runs import WatchedModel
from metaicl.learners.incontext.sequence import InterleavedTransformer, SequenceLearner
from metaicl.learners.incontext.transformer import CausalInContextTransformer
from metaicl.nets.linear_attention import LinearAttention as DualLinearAttention
from metaicl.nets.memory.layers import LinearAttention as LinearMemory
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=2)
LAYERS = {
    "linear attention": lambda: DualLinearAttention(6, heads=3, key_size=4, init_variance=1.0),
    "memory": lambda: LinearMemory(6, heads=2),
    "memory of plain keys": lambda: LinearMemory(6, heads=2, unit_keys=False, key_dim=5, value_dim=4),
}


def tokens(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, n, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(layer: DualLinearAttention | LinearMemory, context: Tensor, queries: Tensor) -> Tensor:
    """The layer's own answer to queries that see a context."""
    if isinstance(layer, DualLinearAttention):
        return layer.read(queries, context.mT @ context)
    return layer.peek(queries, layer(context, layer.start(3, context))[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", LAYERS)
def test_linear_attention_is_zero_shot_plus_update(name, dtype, tolerance):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype).requires_grad_(False)
    demos, own, queries = tokens(7, 1, dtype), tokens(2, 2, dtype), tokens(4, 3, dtype)
    form = dual_form(layer, demos, own, queries)
    for expected, found in (
        (run(layer, torch.cat([demos, own], 1), queries), form.output()),
        (run(layer, own, queries), form.output(demonstrations=False)),
    ):
        assert float((expected - found).abs().max() / expected.abs().max()) < tolerance
    assert float((form.output() - form.output(demonstrations=False)).abs().max()) > 0.01
    nothing = dual_form(layer, demos, own[:, :0], queries)
    assert float(nothing.zero_shot.abs().max()) == 0


@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_a_gradient_step_with_the_values_as_error_signals(name):
    """Delta W = - d/dW of sum_i - <v_i, W k_i>, a linear layer that reads the keys one demonstration at a time."""
    torch.manual_seed(0)
    layer, demos = LAYERS[name]().double(), tokens(5, 1)
    form = dual_form(layer, demos, demos[:, :0], demos)
    one_by_one = [dual_form(layer, demos[:, i : i + 1], demos[:, :0], demos).update for i in range(5)]
    torch.testing.assert_close(torch.stack(one_by_one).sum(0), form.update, rtol=1e-12, atol=1e-12)
    for update in one_by_one:
        assert (torch.linalg.matrix_rank(update) == 1).all()
    if isinstance(layer, DualLinearAttention):
        weights = torch.zeros_like(form.update, requires_grad=True)
        keys = torch.einsum("hkd,bnd->bhnk", layer.key, demos)
        values = torch.einsum("hkd,hke,bne->bhnd", layer.project, layer.value, demos)
        loss = -torch.einsum("bhnd,bhdk,bhnk->", values, weights, keys)
        (slope,) = torch.autograd.grad(loss, weights)
        torch.testing.assert_close(form.update, -slope, rtol=1e-12, atol=1e-12)


def test_layers_without_a_dual_form_are_refused():
    with pytest.raises(TypeError, match="linear attention; got CausalAttention"):
        dual_form(CausalAttention(6, heads=2), tokens(2, 0), tokens(1, 0), tokens(1, 0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no gate"):
        dual_form(LinearMemory(6, heads=2, gate=True), tokens(2, 0), tokens(1, 0), tokens(1, 0))


def small(seed: int = 0, tasks=TASKS, momentum: float | None = None) -> InterleavedTransformer:
    torch.manual_seed(seed)
    return InterleavedTransformer(tasks.spec, dim=8, depth=2, heads=2, max_length=40, momentum=momentum)


@pytest.mark.parametrize("tasks", [TASKS, GaussianClasses(n_way=3)], ids=["regression", "classification"])
def test_each_task_takes_its_own_gradient_step_on_keys_and_values(tasks):
    """Against a loop over tasks with a real optimizer, and hooks against a second forward pass."""
    learner = small(tasks=tasks)
    episode = draw_episodes(tasks, n_shot=4, n_query=3, start=0, stop=3, split="test", seed=1)
    model = WatchedModel(learner)
    found = model.moved(episode, model.slopes(episode), 0.3)
    for task in range(3):
        one = WatchedModel(learner).learner
        before = {name: value.clone() for name, value in one.state_dict().items()}
        part = episode[task]
        answer = one.predict(one.model.start(1, part.support.x), part.support.x)
        if tasks.spec.kind == "regression":
            loss = (answer.mean - part.support.y).square().sum(-1).mean()
        else:
            loss = -answer.log_prob(part.support.y).mean()
        loss.backward()
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if name.endswith("to_query_key_value.weight"):
                    assert parameter.grad is not None
                    parameter[8:] -= 0.3 * parameter.grad[8:]
            after = one.predict(one.model.start(1, part.query.x), part.query.x)
        answers = after.mean if tasks.spec.kind == "regression" else after.logits.softmax(-1)
        torch.testing.assert_close(found.answers[task], answers[0].detach(), rtol=1e-9, atol=1e-11)
        changed = [name for name, value in one.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == [f"model.blocks.{layer}.mixer.to_query_key_value.weight" for layer in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), small(tasks=tasks).parameters(), strict=True))


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_outputs_and_scores_are_those_of_the_layers(momentum):
    learner = small(momentum=momentum)
    model = WatchedModel(learner)
    episode = draw_episodes(TASKS, n_shot=3, n_query=2, start=0, stop=4, split="test", seed=1)
    with torch.no_grad():
        seen = model.in_context(episode)
        own = model.learner
        state = own.adapt(episode.support)
        h = own.tokens.inputs(episode.query.x) + own.model.positions(torch.tensor(6))
        for layer, block in enumerate(own.model.blocks):
            mixed = block.mixer.peek(block.mixer_norm(h), state.layers[layer], own=True)
            torch.testing.assert_close(seen.outputs[:, :, layer], mixed, rtol=1e-10, atol=1e-12)
            query, key, _ = block.mixer.to_query_key_value(block.mixer_norm(h)).unflatten(-1, (3, 2, 4)).unbind(2)
            scores = (query * key).sum(-1) / 2
            torch.testing.assert_close(seen.scores[:, :, layer], scores, rtol=1e-10, atol=1e-12)
            h = block.peek(h, state.layers[layer], own=True)


def test_the_context_of_a_step_is_the_step_itself():
    """A finetuned model beside itself: every similarity is 1, and nothing it corrects is missed."""
    learner, episode = small(), draw_episodes(TASKS, n_shot=4, n_query=3, start=0, stop=6, split="test", seed=1)
    model = WatchedModel(learner)
    with torch.no_grad():
        tuned = model.moved(episode, model.slopes(episode), 0.5)
    model.in_context = lambda part: tuned  # type: ignore[method-assign]
    values = model.compare(episode, 0.5, range(6))
    assert values["aou"] == pytest.approx(np.ones(6))
    assert values["after"] == pytest.approx(np.ones(6))
    assert np.array_equal(values["both"], values["corrected"])
    assert np.abs(values["random"]).max() < 0.999


def test_a_step_of_length_zero_is_similar_to_nothing():
    learner, episode = small(), draw_episodes(TASKS, n_shot=4, n_query=3, start=0, stop=6, split="test", seed=1)
    model = WatchedModel(learner)
    values = model.compare(episode, 0.0, range(6))
    assert np.abs(values["aou"]).max() == 0
    assert values["after"] == pytest.approx(values["before"])
    assert values["corrected"].sum() == 0


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_a_comparison_has_all_its_values(momentum):
    torch.manual_seed(0)
    options = {"dim": 8, "depth": 2, "heads": 2, "momentum": momentum}
    learners = [InterleavedTransformer(TASKS.spec, **options) for _ in range(2)]
    options = {"n_shot": 4, "n_query": 2, "n_episodes": 8, "rates": (0.1, 0.5), "batch_size": 3}
    found = compare_with_finetuning(learners, TASKS, **options)
    assert found.sim_aou.n_seeds == 2
    assert found.sim_aou.n_episodes == 8
    assert len(found.sim_aou_by_layer) == 2
    mean = sum(one.mean for one in found.sim_aou_by_layer.values()) / 2
    assert found.sim_aou.mean == pytest.approx(mean)
    assert found.sim_am_gain.mean == pytest.approx(found.sim_am.mean - found.sim_am_before.mean)
    assert set(found.rates) <= {0.1, 0.5}
    assert 0 <= found.rec2ftp.mean <= 1
    for one in (found.sim_aou, found.sim_aou_random, found.sim_am, *found.sim_aou_by_layer.values()):
        assert one.low is not None
        assert one.high is not None
        assert -1 <= one.low <= one.high <= 1
    assert all(one.low is not None and one.low >= 0 for one in found.losses.values())
    again = compare_with_finetuning(learners, TASKS, **{**options, "batch_size": 8})
    for name in ("sim_aou", "sim_aou_random", "sim_am", "sim_am_before", "rec2ftp"):
        assert getattr(again, name).mean == pytest.approx(getattr(found, name).mean, rel=1e-7)
    assert "SimAOU, random update" in str(found)


def test_wrong_learners_are_refused():
    with pytest.raises(TypeError, match="must be a SequenceLearner; got CausalInContextTransformer"):
        compare_with_finetuning(CausalInContextTransformer(TASKS.spec, dim=8), TASKS, n_shot=4)  # type: ignore[arg-type]
    memory = SequenceLearner(TASKS.spec, model=partial(LinearMemory, heads=2), dim=8)
    with pytest.raises(ValueError, match="no CausalAttention layers"):
        compare_with_finetuning(memory, TASKS, n_shot=4)
    with pytest.raises(ValueError, match="rates must hold at least one"):
        compare_with_finetuning(InterleavedTransformer(TASKS.spec, dim=8), TASKS, n_shot=4, rates=[])
