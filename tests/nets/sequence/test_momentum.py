"""Momentum attention: its formula, the contract of mixers, and derivatives."""

from functools import partial

import pytest
import torch

from metaicl.learners.incontext.sequence import InterleavedTransformer
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.model import SequenceModel
from metaicl.nets.sequence.momentum import MomentumAttention
from metaicl.second_order import twice_differentiable
from metaicl.tasks.functions import LinearRegression

momentum = partial(MomentumAttention, heads=2, momentum=0.7)
MIXERS = {"layer": lambda: momentum(8), "stack": lambda: SequenceModel(8, mixer=momentum, depth=2, max_length=16)}
real_rows = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=MIXERS, name="mixer")
def build(request):
    torch.manual_seed(0)
    return MIXERS[request.param]().double()


@pytest.fixture(name="h")
def tokens():
    return torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_it_equals_its_formula(h):
    torch.manual_seed(0)
    mixer = momentum(8).double()
    plain = CausalAttention(8, heads=2).double()
    plain.load_state_dict(mixer.state_dict())
    out, _ = mixer(h, mixer.start(3, h), real_rows)
    expected, _ = plain(h, plain.start(3, h), real_rows)
    values = mixer.to_query_key_value(h)[..., 16:]
    for task, real in enumerate(real_rows):
        places = real.nonzero()[:, 0].tolist()
        for t, place in enumerate(places):
            total = torch.zeros(8, dtype=h.dtype)
            for i, earlier in enumerate(places[:t]):
                total += 0.7 ** (t - i) * values[task, earlier]
            close(out[task, place], expected[task, place] + mixer.project.weight @ total)


@pytest.mark.parametrize("real", [None, real_rows], ids=["all real", "some real"])
def test_reading_in_pieces_equals_one_pass(mixer, h, real):
    whole, _ = mixer(h, mixer.start(3, h), real)
    state, parts = mixer.start(3, h), []
    for piece in (slice(0, 1), slice(1, 4), slice(4, 7)):
        out, state = mixer(h[:, piece], state, None if real is None else real[:, piece])
        parts.append(out)
    joined = torch.cat(parts, 1)
    close(whole if real is None else whole[real], joined if real is None else joined[real])


def test_tokens_that_are_not_real_behave_as_absent(mixer, h):
    out, state = mixer(h, mixer.start(3, h), real_rows)
    junk = torch.where(real_rows[..., None], h, 1e3 * torch.ones_like(h))
    close(mixer(junk, mixer.start(3, h), real_rows)[0][real_rows], out[real_rows])
    query = h[:, :2].flip(-1)
    for task, real in enumerate(real_rows):
        expected, after = mixer(h[task : task + 1, real], mixer.start(1, h))
        close(out[task : task + 1, real], expected)
        for own in (False, True):
            found = mixer.peek(query, state, own=own)[task : task + 1]
            close(found, mixer.peek(query[task : task + 1], after, own=own))


@pytest.mark.parametrize("n_before", [0, 5])
def test_peeking_with_own_equals_reading_one_more_token(mixer, h, n_before):
    state = mixer.start(3, h)
    if n_before:
        state = mixer(h[:, :n_before], state, real_rows[:, :n_before])[1]
    found = mixer.peek(h[:, 5:], state, own=True)
    for place in (5, 6):
        close(found[:, place - 5 : place - 4], mixer(h[:, place : place + 1], state)[0])


@pytest.mark.parametrize("n_before", [0, 3])
@pytest.mark.parametrize("real", [None, real_rows], ids=["all real", "some real"])
def test_prefixes_equal_a_loop_of_peeks(mixer, h, real, n_before):
    start = mixer.start(3, h)
    if n_before:
        start = mixer(h[:, :n_before].flip(1), start)[1]
    queries = h.flip(-1)
    found = mixer.peek_prefixes(queries, h, start, real)
    for t in range(h.shape[1]):
        state = mixer(h[:, :t], start, None if real is None else real[:, :t])[1] if t else start
        close(found[:, t : t + 1], mixer.peek(queries[:, t : t + 1], state))


def test_later_tokens_change_nothing_and_earlier_ones_do(mixer, h):
    changed = h.clone()
    changed[:, 4:] += torch.randn(3, 3, 8, dtype=h.dtype, generator=torch.Generator().manual_seed(2))
    before, after = (mixer(x, mixer.start(3, x))[0] for x in (h, changed))
    close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amin(-1).min() > 0


def test_derivatives():
    torch.manual_seed(0)
    mixer = MomentumAttention(4, heads=2, momentum=0.4).double()
    h = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True, False, True]])

    def run(x):
        with twice_differentiable():
            out, state = mixer(x, mixer.start(1, x), real)
            return out[:, ::2], mixer.peek(x, state, own=True)

    assert torch.autograd.gradcheck(run, (h,))
    assert torch.autograd.gradgradcheck(run, (h,))


def test_one_argument_gives_it_to_the_transformer():
    spec, options = LinearRegression(dim=2).spec, {"dim": 8, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    learner = InterleavedTransformer(spec, momentum=0.3, **options)
    layers = [module for module in learner.modules() if isinstance(module, MomentumAttention)]
    assert [layer.momentum for layer in layers] == [0.3, 0.3]
    torch.manual_seed(0)
    plain = InterleavedTransformer(spec, **options)
    assert not any(isinstance(module, MomentumAttention) for module in plain.modules())
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.5, 2.0])
def test_a_momentum_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="momentum must lie strictly between 0 and 1"):
        MomentumAttention(8, momentum=wrong)
