"""What nets, threads and modes may do to the engine, and it to them."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaicl import MAML, EpisodeStream, Sinusoid, outer_loop
from metaicl.episode import Episode, Examples
from metaicl.inner_loop.adaptive import Adam, RMSprop
from metaicl.inner_loop.optimizers import SGD
from metaicl.inner_loop.parameters import beyond_word_vectors
from metaicl.inner_loop.rates import Rate
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.learners.gradient.imaml import IMAML
from metaicl.learners.gradient.maml_plus_plus import MAMLPlusPlus
from metaicl.learners.gradient.reptile import Reptile
from metaicl.meta_step import MetaStep
from metaicl.native import without_kernels
from metaicl.second_order import twice_differentiable
from metaicl.spec import TaskSpec

EPISODE = EpisodeStream(Sinusoid(), seed=0, split="train", n_shot=5, n_query=5, chunk_size=4)[0]
SPEC = Sinusoid().spec


def test_a_net_that_was_pruned_by_hand_is_what_its_tensors_say() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    net[0].weight, net[0].bias = nn.Parameter(net[0].weight[:30].clone()), nn.Parameter(net[0].bias[:30].clone())
    net[2].weight = nn.Parameter(net[2].weight[:, :30].clone())
    learner = MAML(SPEC, net=net, inner_steps=2)
    found = learner(EPISODE.support, EPISODE.query.x).mean
    with without_kernels():
        expected = learner(EPISODE.support, EPISODE.query.x).mean
    torch.testing.assert_close(found, expected)


def test_training_goes_on_after_a_look_in_inference_mode() -> None:
    learner = MAML(SPEC, net=nn.Sequential(nn.Linear(1, 23), nn.Tanh(), nn.Linear(23, 1)), inner_lr=0.0123)
    with torch.inference_mode():
        learner(EPISODE.support, EPISODE.query.x)
    next(outer_loop(learner, Sinusoid(), torch.optim.Adam(learner.parameters()), steps=1))


def test_what_does_not_adapt_stays_where_its_gradient_is_infinite() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.ones_(net[2].weight)
    spec = TaskSpec("regression", (3,), y_dim=1)
    learner = MAML(spec, net=net, adapt="2.bias", inner_lr=1e-3, inner_steps=2)
    rows = Examples(torch.full((2, 5, 3), 1e20), torch.zeros(2, 5, 1))
    found = learner.adapt(rows)["2.bias"]
    with without_kernels():
        expected = learner.adapt(rows)["2.bias"]
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(found, expected)


def test_negative_views_are_read_as_numbers() -> None:
    learner = MAML(SPEC)
    support = EPISODE.support
    turned = Examples(torch._neg_view(-support.x), torch._neg_view(-support.y))
    found, expected = (learner(one, EPISODE.query.x).mean for one in (turned, support))
    torch.testing.assert_close(found, expected)


class Words(nn.Module):
    """A bag of words with padding, and a linear map."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 2, padding_idx=0, **options), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.table(x).tanh().mean(1))


TEXTS = TaskSpec("classification", (3,), x_kind="tokens", vocabulary=5, n_way=2)
ROWS = Examples(torch.tensor([[[1, 2, 0], [3, 0, 0]], [[4, 0, 0], [2, 1, 0]]]), torch.tensor([[0, 1], [1, 0]]))


@pytest.mark.parametrize("adapt", [None, "*"])
def test_padding_gets_no_gradient_from_any_task(adapt: str | None) -> None:
    torch.manual_seed(0)
    learner = MAML(TEXTS, net=Words().double(), adapt=adapt, inner_steps=2)
    loss = -learner(ROWS, ROWS.x).log_prob(ROWS.y).sum()
    whole = torch.autograd.grad(loss, learner.net.table.weight)[0]
    alone = [
        torch.autograd.grad(-learner(task, task.x).log_prob(task.y).sum(), learner.net.table.weight)[0]
        for task in (ROWS[0], ROWS[1])
    ]
    assert whole[0].tolist() == [0, 0]
    torch.testing.assert_close(whole, alone[0] + alone[1])


def test_words_counted_over_all_tasks_are_refused() -> None:
    learner = MAML(TEXTS, net=Words(scale_grad_by_freq=True))
    with pytest.raises(RuntimeError, match="scale_grad_by_freq=True counts words over the rows of all tasks"):
        learner(ROWS, ROWS.x)


def test_word_vectors_are_known_in_every_guise() -> None:
    tied = nn.ModuleDict({"out": nn.Linear(2, 5), "table": nn.Embedding(5, 2)})
    tied["table"].weight = tied["out"].weight
    assert beyond_word_vectors(tied) == {"out.bias"}
    bag = nn.ModuleDict({"table": nn.EmbeddingBag(5, 2), "out": nn.Linear(2, 2)})
    assert beyond_word_vectors(bag) == {"out.weight", "out.bias"}
    normed = nn.ModuleDict({"table": nn.utils.parametrizations.weight_norm(nn.Embedding(5, 2))})
    assert beyond_word_vectors(normed) == set()


def test_overlapping_inner_loops_turn_the_switches_back() -> None:
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with twice_differentiable():
            entered.set()
            left.wait()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with twice_differentiable():
        left.set()
        thread.join()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_rates_per_element_keep_the_precision_of_each_tensor() -> None:
    params = {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(())}

    def loss(weights: Any, x: Tensor) -> Tensor:
        return (x @ weights["a"]).mul(weights["b"]).square().mean()

    optimizer = SGD(Rate(0.1, "element")).bind(params, 1)
    fast = unroll_tasks(loss, params, (torch.randn(2, 4, 3).double(),), steps=1, optimizer=optimizer)
    assert {name: value.dtype for name, value in fast.items()} == {"a": torch.float64, "b": torch.float32}


@pytest.mark.parametrize("optimizer", [Adam(0.1), RMSprop(0.1), SGD(0.1, clip_norm=1.0)])
def test_rules_for_real_numbers_refuse_complex_ones(optimizer: Any) -> None:
    params = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match=r"cannot adapt complex parameters, such as \['w'\]; take MAML with SGD"):
        optimizer.bind(params, 1)


def test_implicit_gradients_refuse_complex_parameters() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1, 1, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(self.w.dtype) @ self.w).real

    with pytest.raises(ValueError, match="IMAML cannot adapt complex parameters"):
        IMAML(SPEC, net=Turning())


class Waves(nn.Module):
    """Complex weights, or the same as pairs of real ones, and a real layer."""

    def __init__(self, real: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = torch.randn(2, 1, 3, dtype=torch.float64)
        self.w = nn.Parameter(parts if real else torch.complex(*parts))
        self.out = nn.Linear(3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        w = self.w if self.w.is_complex() else torch.complex(self.w[0], self.w[1])
        return self.out((x @ w.real).square() + (x @ w.imag).tanh() + (x.to(w.dtype) @ w).abs())


@pytest.mark.parametrize(
    "make",
    [
        partial(IMAML, adapt="out.*"),
        partial(IMAML, adapt="out.*", tolerance=1e-3),
        partial(MAML, checkpoint=True),
        partial(MAML, checkpoint=2, adapt="w"),
        partial(MAMLPlusPlus, first_order_until=0.0),
    ],
)
def test_complex_parameters_are_pairs_of_real_ones(make: Any) -> None:
    draws = torch.Generator().manual_seed(0)
    rows = [Examples(*torch.randn(2, 2, 4, 1, dtype=torch.float64, generator=draws)) for _ in range(2)]
    found, expected = (
        MetaStep(make(SPEC, net=Waves(real), inner_steps=3))(Episode(*rows))[1] for real in (False, True)
    )
    pairs = {name: torch.stack([v.real, v.imag]) if v.is_complex() else v for name, v in found.items()}
    assert found["net.w"].is_complex()
    assert float(found["net.w"].abs().min()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(pairs[name], value)


def test_autocast_reaches_learners_with_gradients_of_their_own() -> None:
    learner = Reptile(SPEC, net=nn.Sequential(nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 1)))
    seen: set[torch.dtype] = set()
    learner.net[0].register_forward_hook(lambda *call: seen.add(call[2].dtype))
    next(outer_loop(learner, Sinusoid(), torch.optim.SGD(learner.parameters(), 0.1), steps=1, autocast="bf16"))
    assert torch.bfloat16 in seen
