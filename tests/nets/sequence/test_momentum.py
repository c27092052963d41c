"""Momentum attention: its formula and its derivatives; the contract of mixers is tested with the others."""

import pytest
import torch

from metaicl.learners.incontext.sequence import InterleavedTransformer
from metaicl.nets.sequence.attention import CausalAttention
from metaicl.nets.sequence.momentum import MomentumAttention
from metaicl.second_order import twice_differentiable
from metaicl.tasks.functions import LinearRegression


def test_it_equals_its_formula():
    torch.manual_seed(0)
    h = torch.randn(2, 7, 8, dtype=torch.float64)
    real_rows = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0, 1]], dtype=torch.bool)
    mixer = MomentumAttention(8, heads=2, momentum=0.7).double()
    plain = CausalAttention(8, heads=2).double()
    plain.load_state_dict(mixer.state_dict())
    out, _ = mixer(h, mixer.start(2, h), real_rows)
    expected, _ = plain(h, plain.start(2, h), real_rows)
    values = mixer.to_query_key_value(h)[..., 16:]
    for task, real in enumerate(real_rows):
        places = real.nonzero()[:, 0].tolist()
        for t, place in enumerate(places):
            total = torch.zeros(8, dtype=h.dtype)
            for i, earlier in enumerate(places[:t]):
                total += 0.7 ** (t - i) * values[task, earlier]
            wanted = expected[task, place] + mixer.project.weight @ total
            torch.testing.assert_close(out[task, place], wanted, rtol=1e-11, atol=1e-11)


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
