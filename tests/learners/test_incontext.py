"""What is special to the in-context learners."""

from typing import Any

import pytest
import torch

from metaicl.episode import Examples
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.nets.context import ContextTransformer
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses


@pytest.fixture(scope="module")
def rows() -> Examples:
    tasks = LinearRegression(dim=3)
    return EpisodeStream(tasks, seed=0, split="test", n_shot=9, n_query=4, chunk_size=5)[0].support.to(
        dtype=torch.float64
    )


def test_set_form_ignores_the_order_and_causal_form_does_not(rows: Examples) -> None:
    torch.manual_seed(0)
    order = torch.randperm(9)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for kind, same in ((InContextTransformer, True), (CausalInContextTransformer, False)):
        learner = kind(LinearRegression(dim=3).spec, dim=16, depth=2).double()
        difference = (learner(rows, x).mean - learner(rows.rows(order), x).mean).abs().max()
        assert (difference.item() < 1e-12) == same


def test_one_pass_over_prefixes_equals_adapting_to_each(rows: Examples) -> None:
    learner = CausalInContextTransformer(LinearRegression(dim=3).spec, dim=16, depth=3).double()
    together = learner.predict_prefixes(rows).mean
    for t in range(rows.n_rows):
        alone = learner(rows.rows(slice(0, t)), rows.x[:, t : t + 1]).mean
        torch.testing.assert_close(together[:, t : t + 1], alone, rtol=1e-10, atol=1e-12)


def test_a_grown_cache_equals_a_new_one(rows: Examples) -> None:
    learner = CausalInContextTransformer(LinearRegression(dim=3).spec, dim=16, depth=3).double()
    grown = learner.update(learner.adapt(rows.rows(slice(0, 4))), rows.rows(slice(4, 9)))
    whole = learner.adapt(rows)
    for a, b in zip(grown.keys + grown.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_an_empty_context_is_answered(rows: Examples) -> None:
    spec = LinearRegression(dim=3).spec
    for made in (InContextTransformer(spec), CausalInContextTransformer(spec), ConditionalNeuralProcess(spec)):
        answer = made.double()(rows.rows(slice(0, 0)), rows.x)
        assert bool(answer.mean.isfinite().all())


def test_a_set_cannot_be_extended_and_heads_must_fit() -> None:
    net = ContextTransformer(dim=8, depth=1, heads=2, causal=False)
    cache = net.read(torch.zeros(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="only a causal context can be extended"):
        net.extend(cache, torch.zeros(1, 1, 8), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="heads must divide dim = 8; got 3"):
        ContextTransformer(dim=8, depth=1, heads=3, causal=False)


@pytest.mark.parametrize("kind", [InContextTransformer, CausalInContextTransformer])
def test_sizes_are_checked_when_a_transformer_is_made(kind: Any) -> None:
    spec = LinearRegression(dim=3).spec
    for name in ("dim", "depth", "heads"):
        for value, error in ((0, ValueError), (-2, ValueError), (2.0, TypeError)):
            with pytest.raises(error, match=f"{name} must be an int >= 1; got {value}"):
                kind(spec, **{name: value})
    with pytest.raises(ValueError, match="dim must be an int >= 1; got 0"):
        ConditionalNeuralProcess(spec, dim=0)


def test_sharpness_is_a_factor_on_the_queries_and_keys_of_the_start():
    built = []
    for sharpness in (None, 6.0):
        torch.manual_seed(0)
        learner = InContextTransformer(GaussianClasses().spec, depth=1, sharpness=sharpness)
        block = learner.transformer.blocks[0]
        built.append((block.to_query.weight, block.to_key_value.weight[: len(block.to_query.weight)]))
    (default, _), (query, key) = built
    torch.testing.assert_close(query, 2 * default)
    torch.testing.assert_close(key, query)
    with pytest.raises(ValueError, match="sharpness must be a finite number > 0; got -1"):
        InContextTransformer(GaussianClasses().spec, sharpness=-1)
