"""Encoders of images: the same numbers in every layout, right second derivatives, sizes as published."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from metaicl import ProtoNet, TaskSpec
from metaicl.episode import Episode, Examples
from metaicl.nets.backbones import Conv4
from metaicl.nets.layout import channels_last
from metaicl.nets.norm import BatchStatNorm, mixes_rows
from metaicl.nets.resnet import DropBlock, ResNet12
from metaicl.objectives import query_loss

SMALL = (8, 8, 16, 16)


def images(*shape, seed=0, dtype=torch.float64):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x * (x > 0.4)  # flat background, so that maxima tie


def published_conv4(net, x):
    """Norm, ReLU and then pooling, in the usual layout."""
    for conv, norm in zip(list(net.blocks)[::4], list(net.blocks)[1::4], strict=True):
        y = norm(F.conv2d(x, conv.weight, conv.bias, padding=1).contiguous())
        x = F.max_pool2d(F.relu(y), 2, ceil_mode=True)
    return x.flatten(1)


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 17, 9)])
def test_conv4_is_the_published_chain_in_values_and_slopes(shape):
    torch.manual_seed(0)
    net = Conv4(shape[1], channels=8).double()
    with torch.no_grad():
        for norm in list(net.blocks)[1::4]:
            norm.weight.copy_(torch.randn(8))  # negative gains too
    x = images(*shape).requires_grad_()
    ours, published = net(x), published_conv4(net, x)
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-12)
    wanted = [x, *net.parameters()]
    pairs = [torch.autograd.grad(out.sin().sum(), wanted) for out in (ours, published)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", [lambda: Conv4(channels=8), lambda: ResNet12(1, channels=SMALL)])
def test_vmap_and_a_loop_agree_in_second_derivatives(make):
    torch.manual_seed(0)
    net = make().double()
    start = dict(net.named_parameters())
    x = images(3, 2, 1, 8, 8)

    def after_a_step(parameters, rows):
        def loss(weights):
            return functional_call(net, weights, (rows,)).square().mean()

        slopes = grad(loss)(parameters)
        return loss({name: value - 0.1 * slopes[name] for name, value in parameters.items()})

    batched = vmap(grad(after_a_step), (None, 0))(start, x)
    for task in range(len(x)):
        rows = x[task]  # by plain autograd, in the other layout
        loss = net(rows).square().mean()
        slopes = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        fast = {name: value - 0.1 * slope for (name, value), slope in zip(start.items(), slopes, strict=True)}
        outer = torch.autograd.grad(functional_call(net, fast, (rows,)).square().mean(), list(start.values()))
        for name, value in zip(start, outer, strict=True):
            torch.testing.assert_close(batched[name][task], value, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 3, 5, 4), (1, 1, 1, 1), (0, 1, 4, 4)])
def test_the_layout_changes_and_the_values_do_not(shape):
    x = images(*shape, dtype=torch.float32)
    turned = channels_last(x, nn.Identity())
    assert torch.equal(turned, x)
    assert turned.stride(1) == 1
    assert torch.equal(channels_last(x.transpose(-1, -2), nn.Identity()), x.transpose(-1, -2))


def test_convolutions_keep_the_layout_of_a_single_channel():
    first = nn.Conv2d(1, 4, 3, padding=1)
    assert first(channels_last(images(2, 1, 8, 8, dtype=torch.float32), first)).stride(1) == 1


@pytest.mark.parametrize("trained", ["a vector", "vectors", "the last", "the input"])
@pytest.mark.parametrize("make", [lambda: Conv4(channels=8), lambda: ResNet12(1, channels=SMALL)])
def test_parts_may_be_frozen(make, trained):
    torch.manual_seed(0)
    net, x = make(), images(2, 1, 8, 8, dtype=torch.float32).requires_grad_()
    inputs = {"x": x, **dict(net.named_parameters())}
    everything = dict(zip(inputs, torch.autograd.grad(net(x).sum(), list(inputs.values())), strict=True))
    vectors = [name for name, value in net.named_parameters() if value.ndim == 1]
    wanted = {"a vector": vectors[:1], "vectors": vectors, "the last": [[*inputs][-1]], "the input": ["x"]}[trained]
    for name, value in inputs.items():
        value.requires_grad_(name in wanted)
    found = torch.autograd.grad(net(x).sum(), [inputs[name] for name in wanted])
    for name, slope in zip(wanted, found, strict=True):
        torch.testing.assert_close(slope, everything[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "n_weights"),
    [((64, 160, 320, 640), 12_424_320), ((64, 128, 256, 512), 7_996_800)],
)
def test_resnet12_has_the_published_size(channels, n_weights):
    with torch.device("meta"):
        net = ResNet12(3, channels=channels)
    assert sum(value.numel() for value in net.parameters()) == n_weights
    pairs = zip((3, *channels), channels, strict=False)
    assert n_weights == sum(9 * n * (m + 2 * n) + m * n + 8 * n for m, n in pairs)  # four norms of 2 n each


def test_resnet12_shapes():
    net = ResNet12(1, channels=SMALL)
    for side in (28, 16, 5, 1):
        assert net(images(2, 1, side, side, dtype=torch.float32)).shape == (2, 16)


def test_batch_statistics_are_declared():
    spec = TaskSpec("classification", (1, 8, 8), "image", n_way=2)
    assert mixes_rows(ResNet12(1, channels=SMALL, norm=BatchStatNorm))
    assert ProtoNet(spec, encoder=ResNet12(1, channels=SMALL, norm=BatchStatNorm)).traits.transductive
    assert not ProtoNet(spec, encoder=ResNet12(1, channels=SMALL)).traits.transductive


def test_resnet12_learns_to_tell_stripes_apart():
    torch.manual_seed(0)
    spec = TaskSpec("classification", (1, 8, 8), "image", n_way=2)
    learner = ProtoNet(spec, encoder=ResNet12(1, channels=(4, 4, 8, 8), drop_rate=0.05))
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    source = torch.Generator().manual_seed(0)
    stripes = torch.stack([torch.arange(8) % 2 == 0, torch.arange(8) // 2 % 2 == 0]).float()

    def rows(n):
        y = torch.arange(2).repeat(4, n)
        return Examples(stripes[y][:, :, None, None, :] + torch.randn(*y.shape, 1, 8, 8, generator=source), y)

    losses = []
    for _ in range(60):
        loss = query_loss(learner, Episode(rows(2), rows(3))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_drop_block_blanks_squares_at_its_rate_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropBlock(0.1, size=3)
    x = torch.ones(50, 40, 12, 12)
    out = drop(x)
    blank = out == 0
    assert 0.07 < blank.float().mean() < 0.1  # squares overlap, so a little less than the rate
    assert out.mean() == pytest.approx(1, abs=1e-5)
    squares = F.max_pool2d(F.pad(-F.max_pool2d(-blank.float(), 3, 1), [2] * 4), 3, 1)
    assert torch.equal(squares, blank.float())  # every blank place lies in a blank 3 x 3 square
    assert drop.eval()(x) is x


def test_drop_block_of_a_single_place_stays_finite():
    torch.manual_seed(0)
    assert DropBlock(0.9)(torch.ones(1, 1, 1, 1)).isfinite().all()


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match=r"rate must lie in \[0, 1\)"):
        DropBlock(rate)


def test_resnet12_needs_four_blocks():
    with pytest.raises(ValueError, match="four blocks"):
        ResNet12(3, channels=(8, 8, 8))
