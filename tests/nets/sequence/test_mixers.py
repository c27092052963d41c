"""The contract of causal mixers: pieces, peeks and prefixes give the numbers of one pass, for every bundled one."""

from functools import partial

import pytest
import torch
from torch import nn

from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.looped import Looped
from metaicl.nets.sequence.model import Block, SequenceModel
from metaicl.nets.sequence.momentum import MomentumAttention
from metaicl.second_order import twice_differentiable

attention = partial(CausalAttention, heads=2)
momentum = partial(MomentumAttention, heads=2, momentum=0.7)
MIXERS = {
    "attention": lambda: attention(8),
    "momentum": lambda: momentum(8),
    "stack with momentum": lambda: SequenceModel(8, mixer=momentum, depth=2, max_length=16),
    "block": lambda: Block(8, attention(8)),
    "block without MLP": lambda: Block(8, attention(8), expansion=None),
    "block without mixer": lambda: Block(8, None),
    "stack": lambda: SequenceModel(8, mixer=attention, depth=2),
    "stack with positions": lambda: SequenceModel(8, mixer=attention, depth=2, max_length=16),
    "looped": lambda: Looped(SequenceModel(8, mixer=attention, depth=1, max_length=16), loops=3, window=2),
}
real_rows = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=MIXERS, name="mixer")
def build(request):
    torch.manual_seed(0)
    return MIXERS[request.param]().double()


@pytest.fixture(name="h")
def tokens():
    return torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("real", [None, real_rows], ids=["all real", "some real"])
def test_reading_in_pieces_equals_one_pass(mixer, h, real):
    whole, _ = mixer(h, mixer.start(3, h), real)
    state, parts = mixer.start(3, h), []
    for piece in (slice(0, 1), slice(1, 4), slice(4, 7)):
        out, state = mixer(h[:, piece], state, None if real is None else real[:, piece])
        parts.append(out)
    joined = torch.cat(parts, 1)
    close(whole if real is None else whole[real], joined if real is None else joined[real])


def test_each_token_depends_on_itself_and_earlier_ones_only(mixer, h):
    changed = h.clone()
    changed[:, 4:] += torch.randn(3, 3, 8, dtype=h.dtype, generator=torch.Generator().manual_seed(2))
    before, after = (mixer(x, mixer.start(3, x))[0] for x in (h, changed))
    close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amin(-1).min() > 0


def test_tokens_that_are_not_real_behave_as_absent(mixer, h):
    out, state = mixer(h, mixer.start(3, h), real_rows)
    junk = torch.where(real_rows[..., None], h, 1e3 * torch.ones_like(h))
    other, _ = mixer(junk, mixer.start(3, h), real_rows)
    close(out[real_rows], other[real_rows])
    query = h[:, :2].flip(-1)
    for task, real in enumerate(real_rows):
        alone = h[task : task + 1, real]
        expected, after = mixer(alone, mixer.start(1, h))
        close(out[task : task + 1, real], expected)
        for own in (False, True):
            found = mixer.peek(query, state, own=own)[task : task + 1]
            close(found, mixer.peek(query[task : task + 1], after, own=own))


def test_peeking_with_own_equals_reading_one_more_token(mixer, h):
    _, state = mixer(h[:, :5], mixer.start(3, h), real_rows[:, :5])
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


def test_a_token_that_sees_nothing_gets_the_output_of_a_zero_value(h):
    mixer = attention(8).double()
    bias = mixer.project.bias.expand(3, 7, 8)
    close(mixer.peek(h, mixer.start(3, h)), bias)
    close(mixer.peek_prefixes(h, h, mixer.start(3, h))[:, :1], bias[:, :1])
    unreal = mixer(h, mixer.start(3, h), torch.zeros(3, 7, dtype=torch.bool))[1]
    close(mixer.peek(h, unreal), bias)
    wanted = h.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixer.peek(wanted, unreal).sum(), wanted, materialize_grads=True, allow_unused=True)
    assert slope.isfinite().all()


def test_attention_equals_its_formula(h):
    mixer = attention(8).double()
    out, _ = mixer(h, mixer.start(3, h))
    query, key, value = (part.unflatten(-1, (2, 4)) for part in mixer.to_query_key_value(h).chunk(3, -1))
    for task in range(3):
        for t in range(7):
            heads = []
            for head in range(2):
                scores = torch.stack([query[task, t, head] @ key[task, i, head] / 2 for i in range(t + 1)])
                heads.append(scores.softmax(0) @ value[task, : t + 1, head])
            close(out[task, t], mixer.project(torch.cat(heads)))


@pytest.mark.parametrize("how", ["forward", "peek", "prefixes"])
def test_second_derivatives(how):
    torch.manual_seed(0)
    mixer = SequenceModel(4, mixer=attention, depth=1, expansion=1).double()
    h = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True, False, True]])

    def run(x):
        start = mixer.start(1, x)
        with twice_differentiable():
            if how == "forward":
                return mixer(x, start)[0]
            if how == "peek":
                return mixer.peek(x, mixer(x.flip(1), start, real)[1], own=True)
            return mixer.peek_prefixes(x, x.flip(1), start, real)

    assert torch.autograd.gradcheck(run, (h,))
    assert torch.autograd.gradgradcheck(run, (h,))


def test_more_tokens_than_positions_are_refused_and_unreal_ones_take_none(h):
    model = SequenceModel(8, mixer=attention, depth=1, max_length=5).double()
    with pytest.raises(ValueError, match="max_length must be at least the number of tokens, 7; got 5"):
        model(h, model.start(3, h))
    six = (torch.arange(7) < 6).expand(3, 7)
    with pytest.raises(ValueError, match="max_length must be at least the number of tokens, 6; got 5"):
        model(h, model.start(3, h), six)
    _, state = model(h, model.start(3, h), real_rows)  # 7 tokens, but no task has more than 5 real ones
    with pytest.raises(ValueError, match="max_length"):
        model.peek(h, state)
    short = model(h[:, :4], model.start(3, h))[1]
    assert model.peek(h, short).shape == h.shape
    with pytest.raises(ValueError, match="max_length"):
        model(h[:, 4:6], short)


@pytest.mark.parametrize("places", [slice(0, None, 2), slice(0), slice(-1, None)])
def test_a_stack_can_be_asked_for_some_outputs_only(h, places):
    model = SequenceModel(8, mixer=attention, depth=2, max_length=16).double()
    whole, expected = model(h, model.start(3, h), real_rows)
    some, state = model(h, model.start(3, h), real_rows, places=places)
    close(some, whole[:, places])
    close(model.peek(h, state), model.peek(h, expected))


def test_loops_share_weights_inject_the_input_and_can_be_raised(h):
    body = Block(8, attention(8)).double()
    looped = Looped(body, loops=2)
    first = body(h, body.start(3, h))[0]
    second = body(first + h, body.start(3, h))[0]
    close(looped(h, looped.start(3, h))[0], second)
    old = looped.start(3, h)
    looped.loops = 3
    close(looped(h, looped.start(3, h))[0], body(second + h, body.start(3, h))[0])
    with pytest.raises(ValueError, match="loops = 3; got one of 2"):
        looped(h, old)


def test_training_differentiates_through_the_window_alone(h):
    body = nn.ModuleDict({"block": Block(8, attention(8)).double()})["block"]
    looped = Looped(body, loops=4, window=1).train()
    out = looped(h, looped.start(3, h))[0]
    with torch.no_grad():
        before = looped.passes(h, looped.start(3, h))[2][0]
    expected = body(before + h, body.start(3, h))[0]
    close(out, expected)
    names = [name for name, _ in body.named_parameters()]
    for name, found, wanted in zip(
        names,
        torch.autograd.grad(out.sum(), list(body.parameters())),
        torch.autograd.grad(expected.sum(), list(body.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, msg=name)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="heads must divide dim = 8; got 3"):
        CausalAttention(8, heads=3)
    with pytest.raises(ValueError, match="window must be at most loops = 2; got 3"):
        Looped(Block(8, None), loops=2, window=3)
    with pytest.raises(ValueError, match="depth"):
        SequenceModel(8, mixer=attention, depth=0)


def test_compiled_tokens_beyond_the_last_position_are_refused() -> None:
    """Those that are not real may be anywhere."""
    model = SequenceModel(8, mixer=attention, depth=1, max_length=5)
    compiled = torch.compile(lambda h, real: model(h, model.start(1, h), real)[0], backend="eager")
    h, real = torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0)), torch.arange(7)[None] < 5
    torch.testing.assert_close(compiled(h, real)[:, :5], model(h[:, :5], model.start(1, h))[0])
    with pytest.raises((IndexError, RuntimeError), match="index out of range"):
        compiled(h, torch.ones_like(real))
