"""Against the installed higher package: its differentiable optimizers behind our contract."""

import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from metaicl.interop.higher import HigherMAML
from metaicl.learners.gradient.maml import MAML
from metaicl.nets.backbones import build_net
from metaicl.objectives import query_loss, squared_error
from metaicl.task import derive_generator
from metaicl.tasks.functions import Sinusoid

SINUSOID = Sinusoid()
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
    # higher adds epsilon before Adam's bias correction, torch after it: a tiny one leaves no difference
    "adam": partial(torch.optim.Adam, lr=0.01, eps=1e-16),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, eps=1e-16, amsgrad=True),
    "adagrad": partial(torch.optim.Adagrad, lr=2**-6),  # exact in float32, to which higher rounds Adagrad's step size
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "adamax": partial(torch.optim.Adamax, lr=0.01),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
}


@pytest.fixture(autouse=True)
def _same_nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def waves(n_tasks=3):
    episode = SINUSOID.sample(n_tasks, split="train", n_shot=5, n_query=4, generator=derive_generator("higher"))
    return episode.to(dtype=torch.float64)


def make(optimizer, **settings):
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Differentiable RMSprop")
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(1, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))
        return HigherMAML(SINUSOID.spec, net=net, optimizer=optimizer, inner_steps=3, **settings).double()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fast_weights_equal_the_optimizer_itself(name):
    learner, episode = make(OPTIMIZERS[name]), waves()
    fast = learner.adapt(episode.support)
    for i, task in enumerate(episode):
        net = make(OPTIMIZERS[name]).net
        optimizer = OPTIMIZERS[name](net.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            (net(task.support.x[0]) - task.support.y[0]).square().mean().backward()
            optimizer.step()
        gap = max(float((fast[key][i] - value).detach().abs().max()) for key, value in net.named_parameters())
        assert gap < 1e-12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_equal_finite_differences(name):
    learner, episode = make(OPTIMIZERS[name]), waves()
    parameters = list(learner.net.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(squared_error(learner, episode).sum(), parameters), strict=True
    ):
        place, values = int(gradient.abs().argmax()), []
        with torch.no_grad():
            for shift in (1e-6, -2e-6):
                parameter.view(-1)[place] += shift
                values.append(float(squared_error(learner, episode).sum()))
            parameter.view(-1)[place] += 1e-6
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient.view(-1)[place]), rel=1e-5, abs=1e-7)


def test_default_is_our_maml():
    net = build_net(SINUSOID.spec)
    ours, theirs = (learner(SINUSOID.spec, net=net, inner_steps=2).double() for learner in (MAML, HigherMAML))
    expected, found = (
        torch.autograd.grad(query_loss(each, waves()).sum(), list(net.parameters())) for each in (ours, theirs)
    )
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-12


def test_first_order_takes_gradients_as_constants():
    second, first = make(OPTIMIZERS["adam"]), make(OPTIMIZERS["adam"], first_order=True)
    assert torch.equal(squared_error(second, waves()), squared_error(first, waves()))
    fast = {name: value.detach().requires_grad_() for name, value in first.adapt(waves().support).items()}
    loss = (first.predict(fast, waves().query.x).mean - waves().query.y).square().sum(-1).mean(1).sum()
    expected = [
        part.sum(0) for part in torch.autograd.grad(loss, list(fast.values()))
    ]  # d fast / d start is the identity
    found = torch.autograd.grad(squared_error(first, waves()).sum(), list(first.net.parameters()))
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-12


def test_same_answers_without_gradients_and_frozen():
    learner, episode = make(OPTIMIZERS["momentum"]), waves()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    expected = learner(episode.support, episode.query.x).mean.detach()
    with torch.no_grad():
        assert torch.equal(learner(episode.support, episode.query.x).mean, expected)
        assert not any(value.requires_grad for value in learner.adapt(episode.support).values())
        learner.requires_grad_(False)
        assert torch.equal(learner(episode.support, episode.query.x).mean, expected)
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


def test_every_parameter_is_trained():
    learner = make(OPTIMIZERS["adam"])
    query_loss(learner, waves()).sum().backward()
    assert [name for name, value in learner.named_parameters() if value.grad is None] == []


def test_rmsprop_is_remarked_on_once():
    with pytest.warns(UserWarning, match="RMSprop suffers from gradient correctness"):
        learner = HigherMAML(SINUSOID.spec, optimizer=OPTIMIZERS["rmsprop"]).double()
    assert squared_error(learner, waves()).isfinite().all()


def test_its_step_size_is_that_of_our_maml():
    ours = MAML(SINUSOID.spec, net=make(None).net, inner_lr=0.03, inner_steps=3).double()
    found, expected = (query_loss(learner, waves()) for learner in (make(None, inner_lr=0.03), ours))
    assert float((found - expected).detach().abs().max()) < 1e-12


def test_bad_optimizers():
    with pytest.raises(ValueError, match="give inner_lr or an optimizer"):
        HigherMAML(SINUSOID.spec, inner_lr=0.1, optimizer=OPTIMIZERS["sgd"])
    with pytest.raises(ValueError, match="inner_lr must be a finite number > 0"):
        HigherMAML(SINUSOID.spec, inner_lr=0)
    with pytest.raises(ValueError, match="not supported by higher"):
        HigherMAML(SINUSOID.spec, optimizer=partial(torch.optim.AdamW, lr=0.1))
    with pytest.raises(ValueError, match="ignore the option maximize of SGD"):
        HigherMAML(SINUSOID.spec, optimizer=partial(torch.optim.SGD, lr=0.1, maximize=True))
    with pytest.raises(TypeError, match=r"must make a torch\.optim\.Optimizer; got float"):
        HigherMAML(SINUSOID.spec, optimizer=lambda parameters: 0.1)
    with pytest.raises(ValueError, match="matches no parameter"):
        HigherMAML(SINUSOID.spec, adapt="body.*")


def test_hooks_that_higher_would_not_call_are_named():
    net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    net[1].register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    with pytest.raises(ValueError, match=r"would not call the forward hooks of \['1'\]"):
        HigherMAML(SINUSOID.spec, net=net)
    observed = nn.Linear(1, 1)
    observed.register_forward_hook(lambda layer, inputs, output: output.sin())
    with pytest.raises(ValueError, match=r"hooks of \['Linear'\]"):
        HigherMAML(SINUSOID.spec, net=observed)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "higher", None)
    with pytest.raises(ImportError, match="pip install higher"):
        HigherMAML(SINUSOID.spec)
