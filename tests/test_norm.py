"""Normalization inside inner loops: statistics of the rows, and statistics that never change."""

import copy

import pytest
import torch
from torch import nn

from metaicl.inner_loop.parameters import check_inner_loop_module
from metaicl.learners.gradient.maml import MAML
from metaicl.nets.norm import BatchStatNorm, FrozenNorm, batch_norms, freeze_statistics, mixes_rows
from metaicl.task import derive_generator
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_learner

TASKS = GaussianClasses(n_way=3, dim=4)


def rows(*shape):
    return torch.randn(*shape, generator=derive_generator("rows"), dtype=torch.float64)


def pretrained():
    """A net whose layers have seen rows, in eval mode; the last layer has no weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = nn.BatchNorm1d(5, affine=False)
        net = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Sequential(nn.Linear(6, 5), last)
        ).double()
        net[1].weight.data.normal_()
        net[1].bias.data.normal_()
        for _ in range(3):
            net(2 * torch.randn(20, 4, dtype=torch.float64) + 1)
    return net.eval()


def test_a_frozen_net_answers_as_it_did_in_eval_mode_whatever_the_mode():
    net, x = pretrained(), rows(7, 4)
    before = copy.deepcopy(net.state_dict())
    frozen, expected = freeze_statistics(net), net(x)
    for training in (False, True):
        assert float((frozen.train(training)(x) - expected).detach().abs().max()) < 1e-14
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(net[1], nn.BatchNorm1d)
    assert {id(value) for value in frozen.parameters()}.isdisjoint(id(value) for value in net.parameters())
    assert not any(value.requires_grad for value in frozen[3][1].parameters())  # it had no weights to learn


def test_images_and_a_layer_alone():
    layer = nn.BatchNorm2d(3).double()
    layer(rows(8, 3, 5, 5))
    frozen = freeze_statistics(layer.eval())
    assert isinstance(frozen, FrozenNorm)
    x = rows(2, 3, 4, 4)
    assert float((frozen(x) - layer(x)).detach().abs().max()) < 1e-14


def test_a_frozen_net_can_stand_in_an_inner_loop_and_looks_at_one_row_at_a_time():
    frozen = freeze_statistics(pretrained())
    check_inner_loop_module(frozen)
    assert not mixes_rows(frozen)
    net = nn.Sequential(frozen, nn.Linear(5, 3)).float()
    learner = MAML(TASKS.spec, net=net, inner_lr=0.1)
    assert not learner.traits.transductive
    check_learner(learner, TASKS)


def test_nothing_to_freeze_is_said():
    with pytest.raises(ValueError, match="Sequential has no normalization with running statistics to freeze"):
        freeze_statistics(nn.Sequential(nn.Linear(2, 2), BatchStatNorm(2)))


def test_refused_running_statistics_name_the_ways_out():
    with pytest.raises(ValueError, match=r"BatchStatNorm.*freeze_statistics\(net\)"):
        check_inner_loop_module(pretrained())


def test_batch_norms_by_name():
    inside = nn.Sequential(BatchStatNorm(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    assert batch_norms(nn.Sequential(nn.Linear(2, 2), inside, nn.GroupNorm(1, 2))) == ["1.0", "1.2"]
    assert batch_norms(BatchStatNorm(2)) == [""]
    assert mixes_rows(inside)
    assert not mixes_rows(inside[1])


def test_a_layer_under_two_names_and_instance_normalization_are_frozen_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, alone = nn.BatchNorm1d(4), nn.InstanceNorm1d(2, track_running_stats=True, affine=True)
        net = nn.Sequential(layer, nn.Tanh(), layer, nn.Unflatten(1, (2, 2)), alone, nn.Flatten()).double()
        for _ in range(3):
            net(2 * torch.randn(20, 4, dtype=torch.float64) + 1)
    frozen, x = freeze_statistics(net.eval()), rows(7, 4)
    assert frozen[0] is frozen[2]
    check_inner_loop_module(frozen)
    assert float((frozen(x) - net(x)).detach().abs().max()) < 1e-12
