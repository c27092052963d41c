"""Meta-parameters that are no initial weights: one engine, any loss, every meta-gradient against differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metaicl.inner_loop import SGD, Adam, Rate, unroll_tasks
from metaicl.task import derive_generator

B, N, Q, D = 3, 5, 4, 3  # tasks, support rows, query rows, inputs


def draw(name, *shape):
    return torch.randn(*shape, generator=derive_generator("meta", name), dtype=torch.float64)


X, Y, X_NEW, Y_NEW = draw("x", B, N, D), draw("y", B, N), draw("x new", B, Q, D), draw("y new", B, Q)
START = {"hidden": 0.6 * draw("hidden", 4, D), "head": 0.6 * draw("head", 4)}  # never a meta-parameter here


def predict(weights, x):
    return torch.tanh(x @ weights["hidden"].mT) @ weights["head"]


def squared(weights, x, y):
    return (predict(weights, x) - y).square().mean()


def query(fast):
    """The outer loss: mean squared error on every task's query."""
    outputs = torch.einsum("bqh,bh->bq", torch.tanh(X_NEW @ fast["hidden"].mT), fast["head"])
    return (outputs - Y_NEW).square().mean()


def check(outer, *meta):
    """Every element of the meta-gradient equals a central difference, 1e-5 of the gradient's norm at most."""
    gradients = torch.autograd.grad(outer(), meta)
    for parameter, gradient in zip(meta, gradients, strict=True):
        slopes, flat, step = torch.empty_like(gradient), parameter.detach().view(-1), 1e-5
        for place in range(flat.numel()):
            values = []
            for shift in (step, -2 * step, step):
                flat[place] += shift
                values.append(float(outer().detach()))
            slopes.view(-1)[place] = (values[0] - values[1]) / (2 * step)
        assert float(gradient.norm()) > 1e-4
        assert float((slopes - gradient).norm()) <= 1e-5 * float(gradient.norm())
    return gradients


def leaf(value):
    return value.clone().requires_grad_()


EXACT = pytest.mark.parametrize(
    "settings", [{}, {"checkpoint": True}, {"checkpoint": 2}], ids=["plain", "checkpoint", "segments"]
)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(Rate(0.2, "all")),
        SGD(Rate(0.2, "tensor", per_step=True), momentum=Rate(0.6, "all")),
        SGD(Rate(0.2, "element", per_step=True), weight_decay=Rate(0.1, "tensor")),
        Adam(Rate(0.1, "tensor"), betas=(Rate(0.8, "all"), Rate(0.9, "all")), eps=1e-2),
    ],
    ids=["one", "tensor and step", "element", "adam"],
)
@EXACT
def test_step_sizes_and_momenta_from_fixed_weights(optimizer, settings):
    bound = optimizer.bind(START, steps=3)
    check(
        lambda: query(unroll_tasks(squared, START, (X, Y), steps=3, optimizer=bound, **settings)), *bound.parameters()
    )


def test_a_step_size_is_a_tensor_like_any_other():
    lr = leaf(torch.tensor(0.2, dtype=torch.float64))
    check(lambda: query(unroll_tasks(squared, START, (X, Y), steps=3, lr=lr)), lr)


@EXACT
def test_a_learned_loss_function(settings):
    """The loss is a small network of a row's output and target; its weights come by `shared`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 1), nn.Softplus()).double()

    def loss(params, x, y):
        pairs = torch.stack([predict(params, x), y], -1)
        weights = {name.removeprefix("critic."): value for name, value in params.items() if name.startswith("critic.")}
        return functional_call(critic, weights, (pairs,), strict=True).mean()

    shared = {f"critic.{name}": value for name, value in critic.named_parameters()}

    def outer():
        return query(unroll_tasks(loss, START, (X, Y), steps=3, lr=0.3, shared=shared, **settings))

    *_, last = check(outer, *critic.parameters())
    assert float(last.abs()) > 0  # even the bias of the loss counts, for it goes through a softplus


def test_a_mask_over_weights_decides_how_much_each_adapts():
    """A soft mask on the step of each weight, and one on the weight itself."""
    steps_mask, weight_mask = leaf(draw("steps mask", 4, D)), leaf(draw("weight mask", 4))

    def loss(params, x, y):
        gated = {"hidden": params["hidden"], "head": params["head"] * params["gate"].sigmoid()}
        return squared(gated, x, y)

    def outer():
        optimizer = SGD(0.3, precondition=lambda slopes: {**slopes, "hidden": slopes["hidden"] * steps_mask.sigmoid()})
        fast = unroll_tasks(loss, START, (X, Y), steps=3, optimizer=optimizer, shared={"gate": weight_mask})
        return query({**fast, "head": fast["head"] * weight_mask.sigmoid()})

    check(outer, steps_mask, weight_mask)


@EXACT
def test_a_hard_mask_keeps_weights_where_they_are(settings):
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    optimizer = SGD(0.3, precondition=lambda slopes: {**slopes, "head": slopes["head"] * keep})
    fast = unroll_tasks(squared, START, (X, Y), steps=3, optimizer=optimizer, **settings)["head"]
    assert torch.equal(fast[:, keep == 0], START["head"][keep == 0].expand(B, -1))
    assert float((fast - START["head"])[:, keep == 1].abs().min()) > 1e-4


@EXACT
def test_distilled_support(settings):
    """A few synthetic rows per task and their soft targets are what is learned; the start of the weights is fixed."""
    rows, targets = leaf(X[:, :2]), leaf(Y[:, :2])
    check(lambda: query(unroll_tasks(squared, START, (rows, targets), steps=4, lr=0.3, **settings)), rows, targets)


def test_one_distilled_support_for_all_tasks():
    rows, targets = leaf(X[0, :2]), leaf(Y[0, :2])

    def outer():
        data = rows.expand(B, -1, -1), targets.expand(B, -1)
        return query(unroll_tasks(squared, START, data, steps=4, lr=0.3))

    check(outer, rows, targets)


@EXACT
def test_a_prompt_and_a_context(settings):
    """A prompt all tasks share is learned outside; each task finds its context from a learned start."""
    prompt, context = leaf(draw("prompt", D)), leaf(draw("context", 4))

    def answer(params, x):
        return (torch.tanh((x + params["prompt"]) @ START["hidden"].mT) + params["context"]) @ START["head"]

    def loss(params, x, y):
        return (answer(params, x) - y).square().mean()

    def outer():
        fast = unroll_tasks(loss, {"context": context}, (X, Y), steps=3, lr=0.3, shared={"prompt": prompt}, **settings)
        hidden = torch.tanh((X_NEW + prompt) @ START["hidden"].mT) + fast["context"][:, None]
        return (hidden @ START["head"] - Y_NEW).square().mean()

    check(outer, prompt, context)


@EXACT
def test_weights_of_rows_and_of_tasks(settings):
    """Each support row has a weight in its task's inner loss, each task one in the length of its steps."""
    rows, tasks = leaf(draw("rows", B, N)), leaf(draw("tasks", B))

    def loss(params, x, y, row_weights, task_weight):
        errors = (predict(params, x) - y).square()
        return F.softplus(task_weight) * (row_weights.softmax(0) * errors).sum()

    check(lambda: query(unroll_tasks(loss, START, (X, Y, rows, tasks), steps=3, lr=0.2, **settings)), rows, tasks)


def test_everything_at_once():
    """Start, step size, learned part of the loss and data in one meta-gradient."""
    start = {name: leaf(value) for name, value in START.items()}
    lr, decay, rows = leaf(torch.tensor(0.2, dtype=torch.float64)), leaf(draw("decay", 4)), leaf(X)

    def loss(params, x, y):
        return squared(params, x, y) + (params["decay"].exp() * params["head"].square()).sum()

    def outer():
        return query(unroll_tasks(loss, start, (rows, Y), steps=3, lr=lr, shared={"decay": decay}))

    check(outer, *start.values(), lr, decay, rows)


def test_first_order_has_no_gradient_for_what_only_the_inner_loss_sees():
    """What reaches the outer loss through inner gradients alone cannot be learned by first order."""
    rows, lr = leaf(X), leaf(torch.tensor(0.2, dtype=torch.float64))
    outer = query(unroll_tasks(squared, START, (rows, Y), steps=3, lr=lr, first_order=True))
    assert torch.autograd.grad(outer, rows, allow_unused=True, retain_graph=True) == (None,)
    assert float(torch.autograd.grad(outer, lr)[0].abs()) > 1e-4  # a step size is outside of the gradient


def test_checkpointing_refuses_a_meta_parameter_that_it_would_lose():
    weight = leaf(draw("lost", N))

    def loss(params, x, y):
        return ((predict(params, x) - y).square() * weight.exp()).mean()

    check(lambda: query(unroll_tasks(loss, START, (X, Y), steps=2, lr=0.2)), weight)
    with pytest.raises(ValueError, match=r"pass every meta-parameter that it reads in params or shared"):
        unroll_tasks(loss, START, (X, Y), steps=2, lr=0.2, checkpoint=True)
