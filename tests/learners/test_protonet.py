"""Prototypical networks: both distances, exact sums, streams and clients."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.learner import Merges, Updates
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.meta_step import MetaStep
from metaicl.nets.exact_sums import ClassSums, add_class_sums, class_sums
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_learner

SPEC = TaskSpec("classification", (3,), n_way=4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(n_rows: int, *, n_classes: int = 4, dim: int = 3, seed: int = 0, dtype=torch.float32) -> Examples:
    source = generator(seed)
    x = torch.randn(2, n_rows, dim, generator=source, dtype=dtype)
    return Examples(x, torch.randint(n_classes, (2, n_rows), generator=source))


def nearest_mean(spec: TaskSpec = SPEC, **options) -> ProtoNet:
    return ProtoNet(spec, encoder=nn.Identity(), **options)


def same(first: ClassSums, second: ClassSums) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_answer_is_the_softmax_of_distances_to_the_means():
    support, query = rows_of(12, dtype=torch.float64), rows_of(5, seed=1, dtype=torch.float64)
    for distance in ("euclidean", "cosine"):
        learner = nearest_mean(distance=distance, temperature=0.7).double()
        found = learner(support, query.x).logits
        for b in range(2):
            means = torch.stack([support.x[b][support.y[b] == c].mean(0) for c in range(4)])
            if distance == "cosine":
                gaps = 1 - torch.nn.functional.cosine_similarity(query.x[b][:, None], means[None], dim=-1)
            else:
                gaps = torch.cdist(query.x[b], means).square()
            expected = torch.log_softmax(-learner.similarity.log_temperature.exp() * gaps, -1)
            assert float((found[b] - expected).detach().abs().max()) < 1e-10


def test_a_scale_suits_each_distance():
    for distance, scale in (("euclidean", 3**-0.5), ("cosine", 10.0)):
        assert nearest_mean(distance=distance).similarity.log_temperature.exp().item() == pytest.approx(scale)
    with pytest.raises(ValueError, match=r"distance must be one of .*; got 'cosin'; did you mean 'cosine'\?"):
        nearest_mean(distance="cosin")
    with pytest.raises(ValueError, match="use RidgeHead instead"):
        ProtoNet(Sinusoid().spec)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_logits_are_twice_differentiable_and_finite_at_coincident_points(distance):
    learner = nearest_mean(distance=distance).double()
    support = rows_of(8, dtype=torch.float64)
    same_points = support.x[:, :3].clone()  # one of each is a prototype or close to it

    def logits(x, inputs):
        return learner(Examples(x, few.y), inputs).logits

    few = Examples(support.x[:1, :6], support.y[:1, :6])
    leaves = few.x.clone().requires_grad_(), same_points[:1].clone().requires_grad_()
    assert gradcheck(logits, leaves)
    assert gradgradcheck(logits, leaves)
    same_points.requires_grad_()
    one_shot = Examples(same_points, torch.arange(3).expand(2, 3))
    twice = torch.autograd.grad(learner(one_shot, same_points).logits.square().sum(), same_points, create_graph=True)
    (second,) = torch.autograd.grad(twice[0].square().sum(), same_points)
    assert bool(second.isfinite().all())


def test_sums_by_class_are_the_plain_ones_and_so_is_their_derivative():
    rows, y = torch.randn(2, 9, 5, generator=generator(), dtype=torch.float64), torch.arange(9).expand(2, 9) % 3
    mask = torch.rand(2, 9, generator=generator(1)) < 0.7
    found = class_sums(rows.requires_grad_(), y, 4, mask)
    one_hot = (torch.nn.functional.one_hot(y, 4) * mask[..., None]).double()
    assert float((found.high + found.low - one_hot.mT @ rows).detach().abs().max()) < 9 * 2.0**-47
    assert torch.equal(found.counts, one_hot.sum(1))
    assert torch.equal(found.means()[:, 3], torch.zeros(2, 5, dtype=torch.float64))
    weights = torch.randn(2, 4, 5, generator=generator(2), dtype=torch.float64)
    (slope,) = torch.autograd.grad((found.means() * weights).sum(), rows)
    expected = one_hot @ (weights / one_hot.sum(1).clamp(min=1)[..., None])
    assert float((slope - expected).abs().max()) < 1e-12


def test_float32_rows_are_summed_without_any_error():
    rows = torch.cat([torch.tensor([3e7, 2.0**-22, -1e-3, 1 / 3]), torch.randn(400, generator=generator())])
    total = class_sums(rows[None, :, None], torch.zeros(1, len(rows), dtype=torch.long), 1)
    exact = sum(int(value * 2.0**46) for value in rows.double().tolist())  # integers know no rounding
    assert int(total.high.item() * 2**16) * 2**30 + int(total.low.item() * 2.0**46) == exact
    assert total.means().item() == pytest.approx(exact / 2**46 / len(rows), rel=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_partition_among_clients_gives_the_centralized_state_to_the_last_bit(data):
    n_rows, dim = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 2))
    values = st.floats(-1e6, 1e6, width=32)
    x = torch.tensor(data.draw(st.lists(values, min_size=n_rows * dim, max_size=n_rows * dim))).view(1, n_rows, dim)
    y = torch.tensor([data.draw(st.lists(st.integers(0, 5), min_size=n_rows, max_size=n_rows))])
    learner = nearest_mean(TaskSpec("classification", (dim,), n_way=6))
    whole = Examples(x, y)
    central = learner.adapt(whole)
    owner = data.draw(st.lists(st.integers(0, 3), min_size=n_rows, max_size=n_rows))
    clients = []
    for client in data.draw(st.permutations(range(4))):
        held = data.draw(st.permutations([i for i in range(n_rows) if owner[i] == client]))
        cut = data.draw(st.integers(0, len(held)))
        state = learner.adapt(whole.rows(torch.tensor(held[:cut], dtype=torch.long)))
        clients.append(learner.update(state, whole.rows(torch.tensor(held[cut:], dtype=torch.long))))
    merged = learner.merge([learner.merge(clients[:2]), *clients[2:]])
    assert same(merged, central)
    assert torch.equal(merged.means(), central.means())
    mean = x[0][y[0] == y[0, 0]].double().mean(0)
    assert torch.allclose(merged.means()[0, y[0, 0]], mean, rtol=1e-12, atol=2.0**-46)


def test_classes_grow_one_by_one():
    learner = nearest_mean(TaskSpec("classification", (3,), n_way=2))
    assert isinstance(learner, Updates)
    assert isinstance(learner, Merges)
    rows = rows_of(60, n_classes=7)
    order = rows.y.argsort(1)
    rows = Examples(rows.x.gather(1, order[..., None].expand_as(rows.x)), rows.y.gather(1, order))
    state = learner.adapt(Examples(rows.x[:, :1], rows.y[:, :1], torch.zeros(2, 1, dtype=torch.bool)))
    widths = []
    for i in range(60):
        before = copy.deepcopy(state)
        after = learner.update(state, rows.rows(slice(i, i + 1)))
        assert same(state, before)
        state = after
        widths.append(state.n_classes)
    assert widths[0] == 2
    assert widths[-1] == 7
    assert all(0 <= b - a <= 1 for a, b in itertools.pairwise(widths))
    at_once = nearest_mean(TaskSpec("classification", (3,), n_way=7)).adapt(rows)
    assert same(state, at_once)
    answer = learner.predict(state, rows.x)
    assert answer.logits.shape == (2, 60, 7)
    assert float(answer.probs.sum(-1).sub(1).detach().abs().max()) < 1e-6


def test_clients_may_know_different_numbers_of_classes():
    learner = nearest_mean(TaskSpec("classification", (3,), n_way=2))
    rows = rows_of(30, n_classes=6)
    few = Examples(rows.x, rows.y, rows.y < 2)
    many = Examples(rows.x, rows.y, rows.y >= 2)
    states = [learner.adapt(few), learner.update(learner.adapt(few.rows(slice(0))), many)]
    assert [state.n_classes for state in states] == [2, 6]
    central = nearest_mean(TaskSpec("classification", (3,), n_way=6)).adapt(rows)
    assert same(learner.merge(states), central)
    assert same(learner.merge(states[::-1]), central)


def test_a_stream_answers_only_what_it_was_shown():
    """A client with classes 5 and 7 of a stream: the six between and before them have no row, nor prototypes."""
    learner = nearest_mean(TaskSpec("classification", (3,), n_way=2))
    rows = rows_of(40, n_classes=2)
    shown = Examples(rows.x, torch.where(rows.y == 0, 5, 7))
    state = learner.update(learner.adapt(shown.rows(slice(0))), shown)
    answer = learner.predict(state, torch.zeros(2, 1, 3))  # where the means of nothing would be
    expected = nearest_mean(TaskSpec("classification", (3,), n_way=2))(rows, torch.zeros(2, 1, 3))
    assert float((answer.probs[..., [5, 7]] - expected.probs).detach().abs().max()) < 1e-6
    assert float(answer.probs.detach()[..., [0, 1, 2, 3, 4, 6]].max()) < 2e-30
    assert bool(answer.logits.isfinite().all())
    nothing = learner.predict(learner.adapt(shown.rows(slice(0))), rows.x)
    assert torch.equal(nothing.probs, torch.full((2, 40, 2), 0.5))


def test_labels_out_of_range_are_named_and_those_of_masked_rows_are_not_read():
    learner, rows = nearest_mean(), rows_of(6)
    state = learner.adapt(rows)
    wrong = Examples(rows.x, torch.tensor([[0, -1, 2, 3, -7, 1], [0, 1, 2, 9, 0, 1]]))
    with pytest.raises(
        ValueError, match=r"^examples.y must hold labels >= 0; got \[-7, -1\], the first at task 0, row 1$"
    ):
        learner.update(state, wrong)
    with pytest.raises(
        ValueError,
        match=r"^support.y must hold labels in \[0, n_way=4\); got \[-7, -1, 9\], the first at task 0, row 1$",
    ):
        learner.adapt(wrong)
    real = (wrong.y >= 0) & (wrong.y < 4)
    expected = Examples(rows.x, torch.where(real, wrong.y, 0), real)
    assert same(learner.adapt(Examples(rows.x, wrong.y, real)), learner.adapt(expected))
    assert same(learner.update(state, Examples(rows.x, wrong.y, real)), learner.update(state, expected))


def test_merge_refuses_what_cannot_be_joined():
    learner = nearest_mean()
    with pytest.raises(ValueError, match="at least one state to merge; got none"):
        learner.merge([])
    state = learner.adapt(rows_of(4))
    with pytest.raises(TypeError, match="a list of what adapt and update return; got one state"):
        learner.merge(state)
    with pytest.raises(TypeError, match=r"a list of what adapt and update return; got \['ClassSums', 'Tensor'\]"):
        learner.merge([state, torch.zeros(1, 3)])
    with pytest.raises(ValueError, match=r"agree in their tasks and features \(B, D\); got \[\(1, 3\), \(2, 3\)\]"):
        add_class_sums([state, ClassSums(*(part[:1] for part in state))])


def test_a_thousand_classes_need_no_array_of_queries_by_classes_by_features():
    spec = TaskSpec("classification", (256,), n_way=1000)
    x = torch.randn(1, 2000, 256, generator=generator())
    support = Examples(x, torch.arange(2000)[None] % 1000)
    learner = nearest_mean(spec)
    with torch.profiler.profile(profile_memory=True) as profile:
        logits = learner(support, x[:, :500]).logits
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert logits.shape == (1, 500, 1000)
    assert largest <= 8 * 2000 * 256  # the rows in double precision; Q C D would be 512 MB


@pytest.mark.slow
def test_cosines_compile_into_one_graph():
    tasks = GaussianClasses(n_way=3, dim=4)
    learner = ProtoNet(tasks.spec, distance="cosine")
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=2, n_query=3, chunk_size=3)[0]
    expected, step = MetaStep(learner)(episode), MetaStep(learner, compile=True)
    losses, gradients = step(episode)
    assert step.is_compiled
    assert float((losses - expected[0]).abs().max()) < 1e-5
    assert max(float((gradients[name] - value).abs().max()) for name, value in expected[1].items()) < 1e-5


def test_update_and_merge_keep_the_state_of_an_encoder_in_float64():
    tasks = GaussianClasses(n_way=3, dim=4)
    assert check_learner(ProtoNet, tasks, checks=["answer_shape", "update", "merge"]) is None
    assert check_learner(lambda spec: ProtoNet(spec, distance="cosine"), tasks) is None
    learner = ProtoNet(tasks.spec).double()
    first, second = rows_of(6, n_classes=3, dim=4), rows_of(5, n_classes=3, dim=4, seed=1)
    both = learner.adapt(concatenate(first, second).to(dtype=torch.float64))
    parts = [learner.adapt(part.to(dtype=torch.float64)) for part in (first, second)]
    assert float((learner.merge(parts).means() - both.means()).detach().abs().max()) < 1e-12
