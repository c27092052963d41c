"""The fusion head: it is attention of readers over tokens, written with projections on the readers' side."""

import pytest
import torch

from metaicl.functional import unit_rows
from metaicl.nets.fusion import FusionHead

B, Q, C, L, D = 2, 3, 4, 5, 6


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    readers = torch.randn(B, C, D, generator=generator, dtype=torch.float64)
    states = torch.randn(B, Q, L, D, generator=generator, dtype=torch.float64)
    real = torch.rand(B, Q, L, generator=generator) < 0.7
    real[..., 0] = True
    return readers, states, real, torch.randn(B, Q, L, generator=generator, dtype=torch.float64)


def random_head(**settings) -> FusionHead:
    head = FusionHead(D, **settings).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in head.parameters():
            value += 0.5 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return head


@pytest.mark.parametrize("heads", [1, 2])
def test_it_is_plain_multi_head_attention(heads: int) -> None:
    head, (readers, states, real, bias) = random_head(heads=heads), inputs()
    found = head(readers, states, real, bias)
    for b in range(B):
        for q in range(Q):
            kept = real[b, q]
            tokens, reader = states[b, q][kept], unit_rows(readers[b])
            parts = []
            for h in range(heads):
                queries, keys = reader @ head.to_query[h], tokens @ head.to_key[h]
                scores = queries @ keys.T * head.log_sharpness.exp() / (D / heads) ** 0.5 + bias[b, q][kept]
                parts.append(torch.softmax(scores, -1) @ (tokens @ head.to_value[h]))
            expected = (unit_rows(torch.cat(parts, -1)) * reader * head.readout).sum(-1) * D**0.5
            torch.testing.assert_close(found[b, q], expected, rtol=1e-10, atol=1e-12)


def test_the_mean_weighs_tokens_by_their_bias() -> None:
    head, (readers, states, real, bias) = random_head(pool="mean"), inputs()
    weights = real * bias.exp()
    mean = (states * weights[..., None]).sum(2) / weights.sum(2)[..., None]
    reading = unit_rows(mean @ head.to_value[0])
    expected = torch.einsum("bqd,bcd,d->bqc", reading, unit_rows(readers), head.readout) * D**0.5
    torch.testing.assert_close(head(readers, states, real, bias), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_padding_is_nothing_and_no_token_is_finite(pool: str) -> None:
    head, (readers, states, real, bias) = random_head(pool=pool), inputs()
    filled = torch.where(real[..., None], states, torch.full_like(states, 1e3))
    assert torch.equal(head(readers, states, real, bias), head(readers, filled, real, bias))
    states.requires_grad_()
    nothing = head(readers, states, torch.zeros_like(real), bias)
    assert not bool(nothing.any())
    nothing.sum().backward()
    assert states.grad is not None
    assert bool(states.grad.isfinite().all())


def test_a_start_at_zero_is_zero_and_the_other_a_similarity() -> None:
    readers, states, real, bias = inputs()
    assert not bool(FusionHead(D, start_at_zero=True).double()(readers, states, real, bias).any())
    alone = readers[:, None].transpose(1, 2)[:, :, :1].expand(B, C, 1, D)  # each reader meets its own vector
    logits = FusionHead(D).double()(
        readers, alone, torch.ones(B, C, 1, dtype=torch.bool), torch.zeros(B, C, 1).double()
    )
    assert torch.equal(logits.argmax(-1), torch.arange(C).expand(B, C))


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="heads must divide dim = 6; got 4"):
        FusionHead(D, heads=4)
    with pytest.raises(ValueError, match="fusion must be one of"):
        FusionHead(D, pool="max")
