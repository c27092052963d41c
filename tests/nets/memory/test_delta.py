"""Linear attention and the delta rule: chunks against the loop over tokens, and both against closed forms."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from metaicl.nets.memory.delta import delta_rule, delta_rule_chunked, linear_attention, linear_attention_chunked

TOKENS, KEY, VALUE = 13, 4, 3


def tokens(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    keys = normal(TOKENS, KEY)
    return {
        "queries": normal(TOKENS, KEY),
        "keys": keys / keys.norm(dim=-1, keepdim=True),
        "values": normal(TOKENS, VALUE),
        "strength": torch.rand(2, 3, TOKENS, generator=generator, dtype=torch.float64) * 2,
        "memory": normal(VALUE, KEY),
        "decay": -torch.rand(2, 3, TOKENS, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_chunks_equal_the_loop(chunk: int, gated: bool) -> None:
    given = tokens()
    decay, strength = given.pop("decay") if gated else None, given.pop("strength")
    if not gated:
        given.pop("decay")
    for loop, chunked, more in (
        (linear_attention, linear_attention_chunked, {}),
        (delta_rule, delta_rule_chunked, {"strength": strength}),
    ):
        expected = loop(**given, **more, decay=decay)
        got = chunked(**given, **more, decay=decay, chunk=chunk)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_linear_attention_is_a_sum_over_the_past() -> None:
    given = tokens()
    reads, _ = linear_attention(given["queries"], given["keys"], given["values"], torch.zeros_like(given["memory"]))
    expected = (given["queries"] @ given["keys"].mT).tril() @ given["values"]
    torch.testing.assert_close(reads, expected, rtol=1e-12, atol=1e-12)


def test_the_delta_rule_writes_what_its_last_key_then_recalls() -> None:
    given = tokens()
    given["strength"] = torch.ones_like(given["strength"])
    reads, memory = delta_rule(given["keys"], *(given[name] for name in ("keys", "values", "strength", "memory")))
    torch.testing.assert_close(reads, given["values"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((memory @ given["keys"][..., -1, :, None])[..., 0], given["values"][..., -1, :])


def test_tokens_of_nothing_leave_the_memory_exactly_as_it_is() -> None:
    given = tokens()
    nothing = {name: torch.zeros_like(given[name]) for name in ("keys", "values", "strength", "decay")}
    _, memory = delta_rule_chunked(given["queries"], **nothing, memory=given["memory"], chunk=4)
    assert torch.equal(memory, given["memory"])
    nothing.pop("strength")
    _, memory = linear_attention_chunked(given["queries"], **nothing, memory=given["memory"], chunk=4)
    assert torch.equal(memory, given["memory"])


def test_strong_forgetting_overflows_nothing() -> None:
    given = {name: value.float() for name, value in tokens().items()}
    given["decay"] = torch.full_like(given["decay"], -60.0)  # exp(13 * 60) is beyond float32
    given["decay"].requires_grad_()
    reads, memory = delta_rule_chunked(**given)
    expected, _ = delta_rule(**given)
    torch.testing.assert_close(reads, expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(reads.sum() + memory.sum(), given["decay"])
    assert bool(gradient.isfinite().all())


def test_first_and_second_derivatives_of_the_chunked_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 2), (3, 2), (3, 2), (3,), (2, 2), (3,))  # queries, keys, values, strength, memory, decay
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)

    def delta(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return delta_rule_chunked(*leaves, chunk=2)

    def linear(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention_chunked(*leaves[:3], leaves[4], leaves[5], chunk=2)

    for function in (delta, linear):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_of_zero_forget_all_that_came_before(dtype: torch.dtype) -> None:
    given = {name: value.to(dtype) for name, value in tokens().items()}
    given["decay"][:, 0, [0, 5, 6, 12]] = -torch.inf
    given["decay"][:, 1] = -torch.inf
    strength, bound = given.pop("strength"), 1e-12 if dtype == torch.float64 else 1e-4
    for loop, chunked, more in (
        (linear_attention, linear_attention_chunked, {}),
        (delta_rule, delta_rule_chunked, {"strength": strength}),
    ):
        given["decay"] = given["decay"].detach().requires_grad_()
        expected, got = loop(**given, **more), chunked(**given, **more, chunk=7)
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=bound, atol=bound)
        gradients = [torch.autograd.grad(reads.sum(), given["decay"])[0] for reads, _ in (expected, got)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=bound, atol=bound)
