"""Implicit gradients against the closed form of ridge regression, and what the solvers report."""

import pytest
import torch

from metaicl.inner_loop.implicit import Proximal, diagnose, implicit_tasks, minimize_tasks
from metaicl.inner_loop.solvers import ConjugateGradient, Neumann
from metaicl.inner_loop.unrolling import unroll_tasks
from metaicl.task import derive_generator

STRENGTH = 0.7


def draw(name, *shape):
    return torch.randn(*shape, generator=derive_generator(name), dtype=torch.float64)


X, PROBE = draw("x", 3, 6, 4), draw("probe", 3, 4, 1)


def loss(params, x, y):
    """`scale` is a meta-parameter that does not adapt."""
    return 0.5 * (x @ (params["w"] * params["scale"]) - y).square().sum()


def leaves():
    return [draw("start", 4, 1).requires_grad_(), (1 + draw("scale", 4, 1).sigmoid()).requires_grad_(),
            draw("y", 3, 6, 1).requires_grad_()]  # fmt: skip


def closed_form(start, scale, y):
    a = X * scale[:, 0]
    hessian = a.mT @ a + STRENGTH * torch.eye(4, dtype=torch.float64)
    return torch.linalg.solve(hessian, a.mT @ y + STRENGTH * start)


def found(start, scale, y, solution=None, **settings):
    solution = closed_form(start, scale, y) if solution is None else solution
    problem = Proximal(loss, STRENGTH)
    return implicit_tasks(problem, {"w": solution}, {"w": start}, (X, y), shared={"scale": scale}, **settings)["w"]


def error(**settings):
    """Largest error of the derivatives by start, shared tensor and data, relative to the largest of them."""
    at = leaves()
    expected = torch.autograd.grad((closed_form(*at) * PROBE).sum(), at)
    got = torch.autograd.grad((found(*at, **settings) * PROBE).sum(), at)
    size = max(float(part.abs().max()) for part in expected)
    return max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) / size


def test_the_value_is_the_solution_that_was_given():
    assert torch.equal(found(*leaves()), closed_form(*leaves()))


@pytest.mark.parametrize("solver", [ConjugateGradient(4), Neumann(3000, step=0.02)])
def test_equals_the_closed_form_of_ridge_regression(solver):
    assert error(solver=solver) < 1e-10


@pytest.mark.parametrize("make", [ConjugateGradient, lambda n: Neumann(500 * n, step=0.02)])
def test_the_error_falls_with_the_iterations(make):
    errors = [error(solver=make(n)) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_the_error_falls_with_the_tolerance():
    errors = [error(solver=Neumann(5000, step=0.02), tolerance=tolerance) for tolerance in (0.3, 1e-2, 1e-4, 1e-8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-7


def test_the_error_falls_with_the_inner_steps():
    at = leaves()

    def approximate(steps):
        start = {"w": at[0].detach()}
        problem = Proximal(loss, STRENGTH).objective(start)
        shared = {"scale": at[1].detach()}
        return unroll_tasks(problem, start, (X, at[2].detach()), lr=0.02, steps=steps, shared=shared)["w"]

    errors = [error(solution=approximate(steps)) for steps in (10, 100, 1000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-4


def test_the_path_of_the_inner_loop_is_not_kept():
    at = leaves()
    longer, shorter = (found(*at, solution=closed_form(*at).detach() + shift) for shift in (0.0, 0.1))
    for out in (longer, shorter):
        nodes, todo = set(), [out.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [parent for parent, _ in node.next_functions]
        assert len(nodes) < 15


def test_fixed_point_is_the_neumann_series_with_a_step_of_one_over_the_strength():
    """It converges while the strength exceeds the curvature, which a small scale sees to."""
    at = leaves()
    small = [at[0], (0.02 * at[1]).detach().requires_grad_(), at[2]]
    expected = torch.autograd.grad((closed_form(*small) * PROBE).sum(), small)
    got = torch.autograd.grad((found(*small, solver=Neumann(60)) * PROBE).sum(), small)
    assert max(float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)) < 1e-10


def test_diagnosis_tells_both_errors():
    start, scale, y = (leaf.detach() for leaf in leaves())
    problem, solution = Proximal(loss, STRENGTH), {"w": closed_form(start, scale, y)}
    arguments = {"w": start}, (X, y), {"w": PROBE}
    report = diagnose(
        problem, solution, *arguments, shared={"scale": scale}, solver=ConjugateGradient(9), tolerance=1e-6
    )
    assert float(report.stationarity.max()) < 1e-12
    assert float(report.residual.max()) < 1e-6
    assert report.iterations.tolist() == [4, 4, 4]
    far = diagnose(problem, {"w": solution["w"] + 1}, *arguments, shared={"scale": scale}, solver=ConjugateGradient(2))
    assert float(far.stationarity.min()) > 0.1
    assert float(far.residual.min()) > 1e-3
    assert far.iterations.tolist() == [2, 2, 2]


def test_tasks_stop_where_their_slope_is_small_enough():
    start, scale, y = (leaf.detach() for leaf in leaves())
    problem, arguments = Proximal(loss, STRENGTH), ({"w": start}, (X, y))
    shared = {"scale": scale}
    distances = []
    for tolerance in (0.3, 1e-2, 1e-4, 0.0):
        found = minimize_tasks(problem, *arguments, lr=0.01, steps=4000, tolerance=tolerance, shared=shared)
        distances.append(float((found["w"] - closed_form(start, scale, y)).abs().max()))
        slopes = [
            problem.slopes(at, {"w": start}, shared, arguments[1])["w"].flatten(1).norm(dim=1)
            for at in (found, {"w": start.expand_as(found["w"])})
        ]
        assert bool((slopes[0] <= max(tolerance, 1e-9) * slopes[1]).all())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-10 < distances[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_have_the_precision_of_the_weights(dtype):
    start, scale, y = (leaf.detach().to(dtype) for leaf in leaves())
    problem, arguments, shared = Proximal(loss, STRENGTH), ({"w": start}, (X.to(dtype), y)), {"scale": scale}
    found = minimize_tasks(problem, *arguments, lr=0.1, steps=1, tolerance=0.1, shared=shared)["w"]
    at = start.expand_as(found)
    assert torch.equal(found, at - 0.1 * problem.slopes({"w": at}, {"w": start}, shared, arguments[1])["w"])


def test_a_series_that_diverges_is_an_error():
    with pytest.raises(FloatingPointError, match=r"Neumann series diverges: .* step below 2 / .*ConjugateGradient"):
        error(solver=Neumann(50, step=10.0))


def test_a_second_derivative_is_an_error_and_not_wrong():
    at = leaves()
    (slope,) = torch.autograd.grad((found(*at) * PROBE).sum(), at[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.autograd.grad(slope.sum(), at[1])


def test_solvers_leave_finished_tasks_and_zeros_alone():
    matrices = torch.diag_embed(torch.tensor([[1.0, 1.0], [1.0, 9.0], [2.0, 3.0]], dtype=torch.float64))
    v = torch.tensor([[1.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)

    def product(u):
        return torch.einsum("bij,bj->bi", matrices, u)

    solution = ConjugateGradient(5)(product, v, 1e-10)
    assert float((product(solution.value) - v).abs().max()) < 1e-12
    assert solution.iterations.tolist() == [1, 2, 0]
    series = Neumann(2000, step=0.1)(product, v, 1e-10)
    assert float((product(series.value) - v).abs().max()) < 1e-9
    assert series.iterations[0] > 100
    assert series.iterations[2] == 0


@pytest.mark.parametrize("solver", [ConjugateGradient(5), Neumann(5, step=0.1)])
def test_what_is_not_finite_comes_through_the_solvers(solver):
    broken, v = torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 2)
    for found in (solver(lambda u: broken * u, v, 1e-3), solver(lambda u: u, broken * v, 1e-3)):
        assert found.value.isfinite().all(1).tolist() == [True, False]
        assert found.residual.isfinite().tolist() == [True, False]
        assert int(found.iterations[0]) >= 1


@pytest.mark.parametrize("size", [torch.nan, torch.inf, 1e200])
def test_a_loss_that_is_not_finite_does_not_end_at_the_start(size):
    start, scale, y = (leaf.detach() for leaf in leaves())
    y[1] *= size
    found = minimize_tasks(
        Proximal(loss, STRENGTH), {"w": start}, (X, y), lr=0.01, steps=5, tolerance=1e-2, shared={"scale": scale}
    )["w"]
    assert found[[0, 2]].isfinite().all()
    assert not torch.equal(found[1], start)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: ConjugateGradient(0), ValueError, r"ConjugateGradient\.iterations must be an int >= 1"),
        (lambda: Neumann(2.0), TypeError, r"Neumann\.iterations must be an int"),
        (lambda: Neumann(2, step=0), ValueError, r"Neumann\.step must be a finite number > 0"),
        (lambda: Neumann(2)(lambda u: u, torch.ones(1, 1)), ValueError, r"Neumann\.step must be .* got None"),
        (lambda: Proximal(loss, 0), ValueError, r"Proximal\.strength must be a finite number > 0"),
    ],
)
def test_wrong_settings_are_named(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
