"""Probes find what was planted, their controls do not, and hooks never stay."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metaicl.analysis import probe_targets as target
from metaicl.analysis.activations import collect_activations, recording
from metaicl.analysis.answers import draw_episodes
from metaicl.analysis.probe_report import probe_layers, untrained
from metaicl.analysis.probes import probe, shuffled
from metaicl.collation import concatenate
from metaicl.learners.incontext.memory import MemoryLearner
from metaicl.learners.incontext.neural_process import ConditionalNeuralProcess
from metaicl.learners.incontext.sequence import InterleavedTransformer
from metaicl.learners.incontext.transformer import CausalInContextTransformer
from metaicl.learners.metric.ridge_head import RidgeHead
from metaicl.learners.reference.linear import LeastSquares
from metaicl.nets.memory.layers import Mesa
from metaicl.tasks.functions import LinearRegression
from metaicl.tasks.gaussians import GaussianClasses

TASKS = LinearRegression(dim=3, noise=0.5)


def planted(n: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Activations (B, 2, 8) that hold a target linearly at position 0 and its square root's square at position 1."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 2, 8, generator=g)
    mix = torch.randn(8, 2, generator=g)
    linear, product = hidden[:, 0] @ mix, hidden[:, 1, :2] * hidden[:, 1, 2:4]
    return hidden, torch.stack([linear, product], 1)


def hooks(module: nn.Module) -> int:
    return sum(len(one._forward_hooks) for one in module.modules())


def small(seed: int = 0) -> CausalInContextTransformer:
    torch.manual_seed(seed)
    return CausalInContextTransformer(TASKS.spec, dim=16, depth=2, heads=2)


def test_a_linear_probe_finds_a_planted_direction_and_no_product() -> None:
    hidden, values = planted()
    first, second = probe(hidden, values).r2
    assert first.mean > 0.99
    assert first.low is not None
    assert first.low > 0.99
    assert abs(second.mean) < 0.1
    for one in probe(hidden, shuffled(values)).r2:
        assert one.mean < 0.05


def test_an_mlp_probe_finds_the_product_too() -> None:
    hidden, values = planted(1000)
    first, second = probe(hidden, values, kind="mlp", hidden=32, steps=150).r2
    assert first.mean > 0.97
    assert second.mean > 0.8
    for one in probe(hidden, shuffled(values), kind="mlp", hidden=32, steps=30).r2:
        assert one.mean < 0.05


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_pooled_probe_finds_the_position_that_knows(kind: Any) -> None:
    """The target is a map, or a product, of what position 1 of 3 holds; the others hold noise of the same make."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(600, 3, 8, generator=g)
    known = hidden[:, 1, :2] @ torch.randn(2, 2, generator=g) if kind == "linear" else hidden[:, 1, :2].prod(1)[:, None]
    values = known[:, None].expand(-1, 3, -1) * torch.tensor([0.0, 0.0, 1.0])[:, None]  # of the last position alone
    (found,) = probe(hidden, values, kind=kind, pooled=True, hidden=32).r2
    assert found.mean > (0.99 if kind == "linear" else 0.8)
    assert abs(probe(hidden[:, ::2], values[:, ::2], kind=kind, pooled=True, steps=50).r2[0].mean) < 0.1
    (chance,) = probe(hidden, shuffled(values), kind=kind, pooled=True, steps=50).r2
    assert chance.mean < 0.05


def test_a_pooled_probe_of_one_position_is_the_probe_of_that_position() -> None:
    hidden, values = planted(100)
    alone = probe(hidden[:, :1], values[:, :1]).r2[0]
    pooled = probe(hidden[:, :1], values[:, :1], pooled=True, steps=3).r2[0]
    assert pooled.mean == pytest.approx(alone.mean, abs=1e-9)
    alone = probe(hidden[:, :1], values[:, :1], kind="mlp", steps=20).r2[0]
    assert probe(hidden[:, :1], values[:, :1], kind="mlp", steps=20, pooled=True).r2[0].mean == alone.mean


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("pooled", [False, True])
def test_a_probe_of_noise_is_the_mean(kind: Any, pooled: bool) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, noise = torch.randn(1000, 2, 64, generator=g), torch.randn(1000, 2, 1, generator=g)
    for one in probe(hidden, noise, kind=kind, pooled=pooled, steps=100).r2:
        assert abs(one.mean) < 0.03


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1])
def test_a_constant_target_has_no_r2(kind: Any, value: float) -> None:
    """It has no variance to explain; an R^2 of one would be reached by anything, by shuffled targets too."""
    hidden, values = planted(40)
    values[:, 1] = value
    for wanted in (values, shuffled(values)):
        with pytest.raises(ValueError, match=r"constant at \[1\]"):
            probe(hidden, wanted, kind=kind, steps=10)
    values[:, 1, 0] = hidden[:, 1, 0]  # one output of two is enough
    assert probe(hidden, values, kind=kind, steps=10).r2[1].mean < 1


def test_probes_do_not_depend_on_units_and_offsets() -> None:
    hidden, values = planted(200)
    expected = probe(hidden, values).r2[0].mean
    for x, y in ((hidden, 1e-10 * values), (1e-10 * hidden, values), (hidden, 1e8 + values.double())):
        assert probe(x, y).r2[0].mean == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"constant at \[0, 1\]"):  # nothing is left of them in single precision
        probe(hidden, 1e10 + values)


def test_a_target_that_is_constant_among_the_judged_has_no_r2() -> None:
    hidden, values = planted(40)
    values[30:, 1] = 0.0
    with pytest.raises(ValueError, match="constant"):
        probe(hidden, values)


def test_probes_are_deterministic() -> None:
    hidden, values = planted(100)
    for kind in ("linear", "mlp"):
        first, second = (probe(hidden, values, kind=kind, steps=20).r2 for _ in range(2))
        assert [one.mean for one in first] == pytest.approx([one.mean for one in second], rel=1e-6)


def test_targets_equal_their_definitions() -> None:
    episode = draw_episodes(TASKS, n_shot=5, n_query=1, start=0, stop=7, split="test", seed=1)
    stream, latents = concatenate(episode.support, episode.query), episode.latents
    solved = target.preconditioned_input(0.3)(stream, latents)
    ridge = target.ridge_weights(0.3)(stream, latents)
    moments, fits = target.moment(stream, latents), target.least_squares_weights(stream, latents)
    for b in range(7):
        for t in range(6):
            x, y = stream.x[b, :t].numpy(), stream.y[b, :t].numpy()
            gram = x.T @ x + 0.3 * np.eye(3)
            assert moments[b, t].numpy() == pytest.approx((x.T @ y)[:, 0], abs=1e-12)
            assert ridge[b, t].numpy() == pytest.approx(np.linalg.solve(gram, x.T @ y)[:, 0], abs=1e-12)
            assert solved[b, t].numpy() == pytest.approx(np.linalg.solve(gram, stream.x[b, t].numpy()), abs=1e-12)
            assert fits[b, t].numpy() == pytest.approx((np.linalg.pinv(x) @ y)[:, 0], abs=1e-8)
    assert torch.equal(target.true_weights(stream, latents)[:, 3], latents["weights"])
    assert torch.equal(target.own_target(stream, latents), stream.y)
    assert torch.equal(target.last_target(stream, latents)[:, 1:], stream.y[:, :-1])
    with pytest.raises(ValueError, match="latents"):
        target.true_weights(stream, {})
    labels = draw_episodes(GaussianClasses(), n_shot=1, n_query=1, start=0, stop=2, split="test", seed=1)
    with pytest.raises(ValueError, match="regression"):
        target.moment(labels.support, {})


def test_activations_are_those_of_the_forward_pass() -> None:
    """The last block's output for the queries, normed and read by the head, is the learner's own answer."""
    learner = small()
    episode = draw_episodes(TASKS, n_shot=4, n_query=1, start=0, stop=6, split="test", seed=1)
    found = collect_activations(learner, episode, ["transformer.blocks.*", "transformer.norm"], batch_size=4)
    assert set(found) == {"transformer.blocks.0", "transformer.blocks.1", "transformer.norm"}
    assert all(value.shape == (6, 5, 16) for value in found.values())
    assert torch.equal(learner.transformer.norm(found["transformer.blocks.1"]), found["transformer.norm"])
    stream = concatenate(episode.support, episode.query).to(dtype=torch.float32)
    expected = learner.predict_prefixes(stream).mean
    assert torch.allclose(learner.head(found["transformer.norm"]).mean, expected, atol=1e-6)
    assert hooks(learner) == 0


def test_outputs_are_recorded_before_the_next_module_writes_over_them() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), recording(net, ["0"]) as outputs:
        net(x)
    assert torch.equal(outputs["0"][0], net[0](x))
    assert float(outputs["0"][0].min()) < 0


def test_hooks_are_gone_after_an_error() -> None:
    learner = small()

    def fail() -> None:
        with recording(learner, ["transformer.*"]):
            assert hooks(learner) > 0
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert hooks(learner) == 0
    with pytest.raises(ValueError, match="matches none"):
        collect_activations(learner, draw_some(), ["nothing"])
    with pytest.raises(ValueError, match="calls of"):
        collect_activations(learner, draw_some(), ["transformer.norm"], call=3)
    with pytest.raises(ValueError, match="calls of"):
        collect_activations(learner, draw_some(), ["transformer.blocks.0.attention_norm"], call=9)
    assert hooks(learner) == 0


def draw_some() -> Any:
    return draw_episodes(TASKS, n_shot=3, n_query=1, start=0, stop=2, split="test", seed=1)


def test_layers_beside_their_controls(tmp_path: Any) -> None:
    """Inputs are in the activations of any net; targets of other episodes are in none."""
    learner = small()
    state = {name: value.clone() for name, value in learner.state_dict().items()}
    options: Any = {"n_shot": 4, "n_episodes": 200, "names": ["embed.from_x", "transformer.blocks.0"]}
    found = probe_layers(
        learner,
        TASKS,
        targets={"x": lambda stream, latents: stream.x, "w": target.true_weights},
        controls={"untrained": untrained(learner)},
        **options,
    )
    assert set(found.r2["x"]) == {"trained", "shuffled", "untrained"}
    for subject in ("trained", "untrained"):
        assert all(one.mean > 0.99 for one in found.r2["x"][subject]["embed.from_x"])
    assert all(one.mean < 0.1 for one in found.r2["x"]["shuffled"]["embed.from_x"])
    assert all(one.mean < 0.1 for one in found.r2["w"]["trained"]["embed.from_x"])
    assert len(found.r2["w"]["trained"]["transformer.blocks.0"]) == 4
    assert all(torch.equal(state[name], value) for name, value in learner.state_dict().items())
    assert "untrained" in str(found)
    found.to_json(tmp_path / "probes.json")
    found.plot(tmp_path / "probes.png")
    assert (tmp_path / "probes.png").stat().st_size > 5_000


def test_pooled_probes_of_layers_have_one_value_each(tmp_path: Any) -> None:
    """The sum of all inputs is in the embeddings of all positions, and in none of one."""
    options: Any = {"names": ["embed.from_x"], "controls": {}, "n_shot": 3, "n_episodes": 200}

    def total(stream: Any, latents: Any) -> Tensor:
        return stream.x.cumsum(1) - stream.x[:, :1]  # position 0, which has seen no row, is not probed

    alone, pooled = (probe_layers(small(), TASKS, targets={"sum": total}, pooled=p, **options) for p in (False, True))
    (found,) = pooled.r2["sum"]["trained"]["embed.from_x"]
    assert found.mean > 0.9 > 0.6 > alone.r2["sum"]["trained"]["embed.from_x"][-1].mean
    assert pooled.r2["sum"]["shuffled"]["embed.from_x"][0].mean < 0.1
    assert "on all positions" in str(pooled)
    (axes, *_) = pooled.plot(tmp_path / "pooled.png").axes
    assert axes.get_xlim() == (2.5, 3.5)


def test_an_untrained_copy_has_other_weights_of_the_same_make() -> None:
    learner = small()
    fresh, again, other = untrained(learner), untrained(learner), untrained(learner, seed=1)
    for name, value in fresh.state_dict().items():
        assert value.shape == learner.state_dict()[name].shape
        assert torch.equal(value, again.state_dict()[name])
    changed = [name for name, value in learner.named_parameters() if not torch.equal(value, fresh.state_dict()[name])]
    assert "transformer.start" in changed
    assert "head.linear.weight" in changed
    assert not torch.equal(fresh.head.linear.weight, other.head.linear.weight)


def test_an_untrained_copy_starts_as_modules_do() -> None:
    """Small positions, the first lambda and gates of a memory, and queries that are the keys of a Transformer."""
    learner = MemoryLearner(TASKS.spec, memory=partial(Mesa, gate=True), dim=16, depth=1)
    positions = InterleavedTransformer(TASKS.spec, dim=16, depth=1, max_length=64)
    tied = small()
    with torch.no_grad():
        for parameter in (*learner.parameters(), *positions.parameters(), *tied.parameters()):
            parameter.fill_(2.0)
    mixer = next(one for one in untrained(learner).modules() if isinstance(one, Mesa))
    assert mixer.log_regularizer.tolist() == [0.0]
    assert mixer.to_gates is not None
    torch.testing.assert_close(mixer.to_gates.bias, torch.full((1,), 0.99).logit())
    weight = dict(untrained(positions).named_parameters())["model.positions.weight"]
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    block = untrained(tied).transformer.blocks[0]
    assert torch.equal(block.to_query.weight, block.to_key_value.weight[:16])


def test_nonsense_is_refused() -> None:
    hidden, values = planted(40)
    with pytest.raises(ValueError, match="same episodes"):
        probe(hidden, values[:20])
    with pytest.raises(ValueError, match="16 episodes"):
        probe(hidden[:8], values[:8])
    with pytest.raises(ValueError, match="finite"):
        probe(hidden * float("nan"), values)
    with pytest.raises(ValueError, match="kind"):
        probe(hidden, values, kind="forest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one quantity"):
        probe_layers(small(), TASKS, names=["head"], targets={}, controls={}, n_shot=2)
    options: Any = {"targets": {"w": target.true_weights}, "n_shot": 2}
    for names in ([], "head"):
        with pytest.raises(ValueError, match="names must be a list"):
            probe_layers(small(), TASKS, names=names, controls={}, **options)
    for name in ("trained", "shuffled"):
        with pytest.raises(ValueError, match=f"names of their own: .*{name}"):
            probe_layers(small(), TASKS, names=["head"], controls={name: small()}, **options)
    with pytest.raises(ValueError, match="matches none"):
        probe_layers(
            LeastSquares(TASKS.spec), TASKS, names=["x"], targets={"w": target.true_weights}, controls={}, n_shot=2
        )


def test_modules_without_a_place_for_each_row_are_named() -> None:
    options = {"targets": {"w": target.true_weights}, "controls": {}, "n_shot": 2, "n_episodes": 16}
    with pytest.raises(ValueError, match=r"'encoder.0' must have shape \(B, 1, H\)"):
        probe_layers(RidgeHead(TASKS.spec), TASKS, names=["encoder.*"], **options)
    with pytest.raises(ValueError, match="'head' was not called"):
        probe_layers(ConditionalNeuralProcess(TASKS.spec), TASKS, names=["head"], **options)
