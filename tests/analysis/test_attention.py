"""Maps give back the layers' own outputs; scores know a head that was built to copy; hooks never stay."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaicl.analysis.activations import recording
from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.attention import attention_scores, draw_maps
from metaicl.analysis.attention_maps import attention_maps
from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.incontext.sequence import InterleavedTransformer, LoopedTransformer
from metaicl.learners.incontext.transformer import CausalInContextTransformer, InContextTransformer
from metaicl.nets.context import ContextBlock
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=3)
LEARNERS = {
    "set": InContextTransformer,
    "causal": CausalInContextTransformer,
    "interleaved": InterleavedTransformer,
    "momentum": lambda spec, **options: InterleavedTransformer(spec, momentum=0.5, **options),
}


def build(name: str, tasks=TASKS, **options) -> Learner:
    torch.manual_seed(0)
    return LEARNERS[name](tasks.spec, **{"dim": 8, "depth": 2, "heads": 2, **options}).double()


def draw(tasks=TASKS, n_shot: int = 5) -> Episode:
    return draw_episodes(tasks, n_shot=n_shot, n_query=3, start=0, stop=4, split="test", seed=1)


def masked(support: Examples) -> Examples:
    mask = support.real.clone()
    mask[0, 1] = mask[2, 3] = mask[2, 4] = False
    return Examples(support.x, support.y, mask)


def values_of(block: nn.Module, name: str, calls: dict[str, list[Tensor]], n_tokens: int) -> Tensor:
    """Values (B, heads, T, size) of all tokens of one pass, zeros for queries that nobody sees."""
    part = "to_key_value" if isinstance(block, ContextBlock) else "to_query_key_value"
    rows = torch.cat(calls[f"{name}.{part}"], 1)
    values = rows.chunk(2 if isinstance(block, ContextBlock) else 3, -1)[-1]
    values = torch.nn.functional.pad(values, (0, 0, 0, n_tokens - values.shape[1]))
    return values.unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.parametrize("some", [False, True], ids=["all real", "some masked"])
@pytest.mark.parametrize("name", ["set", "causal", "interleaved"])
def test_weights_times_values_are_what_the_layers_computed(name, some):
    learner, episode = build(name), draw()
    support = masked(episode.support) if some else episode.support
    maps = attention_maps(learner, support, episode.query.x)
    n_context = 6 if name != "interleaved" else 10
    blocks = {layer: learner.get_submodule(layer) for layer in maps.weights}
    parts = [f"{layer}.{part}" for layer in blocks for part, _ in blocks[layer].named_children() if "norm" not in part]
    with torch.no_grad(), recording(learner, parts) as calls:
        learner(support, episode.query.x)
    real = torch.nn.functional.pad(support.real, (1, 0), value=True)
    if name == "interleaved":
        real = support.real.repeat_interleave(2, 1)
    for layer, weights in maps.weights.items():
        assert weights.shape == (4, 2, n_context + 3, n_context + 3)
        block = blocks[layer]
        mixed = weights @ values_of(block, layer, calls, n_context + 3)
        expected = block.project(mixed.transpose(1, 2).flatten(2))
        outputs = calls[f"{layer}.project"]
        torch.testing.assert_close(expected[:, n_context:], outputs[-1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(maps.of_queries()[layer].sum(-1), torch.ones(4, 2, 3, dtype=torch.float64))
        if len(outputs) == 2:
            torch.testing.assert_close(expected[:, :n_context][real], outputs[0][real], rtol=1e-10, atol=1e-12)
        else:
            assert float(weights[:, :, :n_context].abs().max()) == 0
        unseen = ~torch.nn.functional.pad(real, (0, 3), value=True)[:, None, None].expand_as(weights)
        others = unseen & ~torch.eye(n_context + 3, dtype=torch.bool)
        assert float((weights * others).abs().max()) == 0


def test_what_a_token_cannot_see_has_no_weight():
    episode = draw()
    n = 5
    for name, n_context, causal, own in (
        ("set", 6, False, False),
        ("causal", 6, True, False),
        ("momentum", 10, True, True),
    ):
        maps = attention_maps(build(name), episode.support, episode.query.x)
        first = next(iter(maps.weights.values()))
        expected = torch.zeros(n_context + 3, n_context + 3, dtype=torch.bool)
        expected[:n_context, :n_context] = True
        expected = expected.tril() if causal else expected
        expected[n_context:, :n_context] = True
        if own:
            expected |= torch.eye(n_context + 3, dtype=torch.bool)
        assert torch.equal((first > 0).all(0).all(0), expected)
        assert maps.inputs.tolist() == ([1 + i for i in range(n)] if n_context == 6 else [2 * i for i in range(n)])


class Exact(LinearRegression):
    """Streams whose queries repeat the inputs of the support, last first."""

    def sample(self, n_tasks, *, split, n_shot, n_query, generator) -> Episode:
        episode = super().sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)
        order = torch.arange(n_shot - 1, n_shot - 1 - n_query, -1)
        query = Examples(episode.support.x[:, order], episode.support.y[:, order])
        return Episode(episode.support, query, episode.latents)


@pytest.mark.parametrize(("name", "found_twice"), [("set", False), ("interleaved", True)])
def test_a_head_that_compares_inputs_copies(name, found_twice):
    """Keys and queries are the same large multiple of x in head 0, and zero in head 1; some queries see themselves."""
    tasks = Exact(dim=3)
    learner = build(name, tasks, depth=1, **({"max_length": None} if name == "interleaved" else {}))
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
        if name == "set":
            block, x_map = learner.transformer.blocks[0], learner.embed.from_x
            query, key, norm = block.to_query.weight, block.to_key_value.weight, block.attention_norm
        else:
            block, x_map = learner.model.blocks[0], learner.tokens.from_x
            joint, norm = block.mixer.to_query_key_value.weight, block.mixer_norm
            query, key = joint[:8], joint[8:16]
        x_map.weight[:3] = torch.eye(3)
        x_map.weight[3:6] = -torch.eye(3)  # the mean of a token is 0, so that the norm keeps directions
        norm.weight.fill_(1)
        query[:3, :3] = key[:3, :3] = 40 * torch.eye(3)
    found = attention_scores(learner, tasks, n_shot=3, n_query=2, n_episodes=40)
    (layer,) = found.matching
    copying, idle = found.matching[layer]
    assert copying.mean > (0.49 if found_twice else 0.95)
    assert found.entropy[layer][0].mean == pytest.approx(np.log(2) if found_twice else 0.0, abs=0.1)
    assert idle.mean == pytest.approx(found.chance)
    assert found.entropy[layer][1].mean == pytest.approx(found.most)
    assert found.chance == pytest.approx(1 / 4 if name == "set" else 1 / 7)
    assert found.following[layer][0].mean < 0.05


def test_following_is_the_token_after():
    """Against a loop over episodes, queries and heads."""
    learners = [build("interleaved", max_length=20), build("interleaved", max_length=20)]
    episode = draw_episodes(TASKS, n_shot=5, n_query=2, start=0, stop=6, split="test", seed=3)
    with torch.no_grad():
        learners[1].model.positions.weight.add_(1.0)
    found = attention_scores(learners, TASKS, n_shot=5, n_query=2, n_episodes=6, seed=3, batch_size=4)
    for layer, heads in found.following.items():
        for head, one in enumerate(heads):
            matching, following = [], []
            for learner in learners:
                weights = attention_maps(learner, episode.support, episode.query.x).weights[layer]
                for task in range(6):
                    for query in range(2):
                        far = (episode.support.x[task] - episode.query.x[task, query]).square().sum(-1)
                        place = 2 * int(far.argmin())
                        row = weights[task, head, 10 + query]
                        matching.append(float(row[place]))
                        following.append(float(row[place + 1]))
            assert one.mean == pytest.approx(np.mean(following), rel=1e-9)
            assert found.matching[layer][head].mean == pytest.approx(np.mean(matching), rel=1e-9)
            assert one.n_seeds == 2


@pytest.mark.parametrize("name", ["set", "causal", "interleaved"])
def test_equal_attention_follows_by_chance(name):
    learner = build(name)
    with torch.no_grad():
        for key, weight in learner.named_parameters():
            if "to_query" in key:
                weight.zero_()
    found = attention_scores(learner, TASKS, n_shot=3, n_query=2, n_episodes=40)
    for one in [head for heads in found.following.values() for head in heads]:
        assert one.mean == pytest.approx(found.chance, rel=1e-5)


def test_classification_tables_and_pictures(tmp_path):
    tasks = GaussianClasses(n_way=3)
    learner = build("set", tasks)
    found = attention_scores(learner, tasks, n_shot=2, n_episodes=10)
    assert "equal attention: 0.143" in str(found)
    found.to_json(tmp_path / "scores.json")
    record = json.loads((tmp_path / "scores.json").read_text())
    assert len(record["matching"]["transformer.blocks.1"]) == 2
    figure = found.plot(tmp_path / "scores.png")
    assert [len(axes.patches) for axes in figure.axes] == [4, 4, 4]
    episode = draw(tasks)
    maps = draw_maps(attention_maps(learner, episode.support, episode.query.x), tmp_path / "maps.png")
    assert len(maps.axes) == 3
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("scores.png", "maps.png"))


def test_the_learner_is_left_alone_and_strangers_are_refused():
    learner, episode = build("causal"), draw()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    attention_maps(learner, episode.support, episode.query.x)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert not any(module._forward_hooks for module in learner.modules())
    with pytest.raises(TypeError, match="MAML has no ContextBlock"):
        attention_maps(MAML(TASKS.spec).double(), episode.support, episode.query.x)
    looped = LoopedTransformer(TASKS.spec, dim=8, heads=2, loops=3, window=None).double()
    with pytest.raises(ValueError, match="must be called once"):
        attention_maps(looped, episode.support, episode.query.x)


def test_intervals_of_attention_end_where_it_can():
    """Two seeds that differ say little about others."""
    learners = [build("interleaved"), InterleavedTransformer(TASKS.spec, dim=8, depth=2, heads=2).double()]
    found = attention_scores(learners, TASKS, n_shot=3, n_episodes=20)
    tables = (found.matching, found.following, found.entropy)
    ends = [one.low for table in tables for heads in table.values() for one in heads if one.low is not None]
    assert len(ends) == 12
    assert min(ends) == 0
    assert max(one.high for heads in found.entropy.values() for one in heads) == found.most


def test_a_row_that_nothing_follows_has_no_score_of_following():
    with pytest.raises(ValueError, match="followed by another one; got none with n_shot = 1 and n_episodes = 4"):
        attention_scores(build("causal"), TASKS, n_shot=1, n_episodes=4)
    alone = attention_scores(build("interleaved"), TASKS, n_shot=1, n_episodes=4)  # a target follows every input
    assert all(one.mean > 0 for layer in alone.following.values() for one in layer)
