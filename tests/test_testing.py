import os
import pickle
import random

import broken_learners as broken
import pytest
import torch
from class_pool import OWNED, Pool
from numpy.random.mtrand import get_bit_generator

from metaicl.episode import Episode, Examples
from metaicl.exam.tasks import _chi_square, _highest
from metaicl.learners.gradient.maml import MAML
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import (
    LEARNER_CHECKS,
    TASK_CHECKS,
    LearnerCheckError,
    TaskCheckError,
    check_learner,
    check_tasks,
    parametrize_with_checks,
)

LINEAR = LinearRegression(dim=2, noise=0.1)
CLASSES = GaussianClasses(n_way=3, dim=4)


class TwoFaults(broken.DeadParameter, broken.ConsumesGlobalRng):
    pass


def test_a_ready_learner_is_left_alone_and_the_global_generators_too():
    learner = MAML(LINEAR.spec).train()
    weights = {name: value.clone() for name, value in learner.state_dict().items()}
    states = torch.get_rng_state(), get_bit_generator().state["state"]["pos"], random.getstate()
    check_learner(learner, LINEAR)
    assert learner.training
    assert all(torch.equal(value, weights[name]) for name, value in learner.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (get_bit_generator().state["state"]["pos"], random.getstate()) == states[1:]


def test_all_failures_are_collected_with_numbers_and_hints():
    with pytest.raises(LearnerCheckError) as caught:
        check_learner(TwoFaults, LINEAR)
    assert set(caught.value.failures) == {"meta_gradient", "global_rng"}
    message = str(caught.value)
    assert message.startswith("TwoFaults fails 2 of its checks")
    assert "no gradient reaches ['unused'] (1 of 8 parameters)" in message
    assert "global generator of torch in eval mode" in message
    assert message.count("Hint: ") == 2


def test_comparisons_name_the_largest_difference():
    with pytest.raises(
        LearnerCheckError, match=r"queries asked together and one by one: \d+ of 24 numbers differ, most"
    ):
        check_learner(broken.PeeksAtQueries, LINEAR)


def test_expected_failures_are_strict():
    known = {"meta_gradient": "an unused parameter is kept for old checkpoints"}
    assert check_learner(broken.DeadParameter, LINEAR, expected_failures=known) is None
    with pytest.raises(LearnerCheckError, match=r"was expected to fail .* but passes"):
        check_learner(broken.Honest, LINEAR, expected_failures=known)


def test_names_of_checks_are_checked():
    with pytest.raises(ValueError, match="did you mean 'masked_rows'"):
        check_learner(broken.Honest, LINEAR, checks=["mask_rows"])
    with pytest.raises(ValueError, match="expected_failures must be one of"):
        check_learner(broken.Honest, LINEAR, checks=["sizes"], expected_failures={"learns": "is not run"})
    with pytest.raises(ValueError, match="checks must be one of"):
        check_tasks(LINEAR, checks=["learns"])


def test_chosen_checks_run_alone():
    assert check_learner(TwoFaults, LINEAR, checks=["masked_rows", "sizes"]) is None
    with pytest.raises(LearnerCheckError) as caught:
        check_learner(TwoFaults, LINEAR, checks=["global_rng", "sizes"])
    assert list(caught.value.failures) == ["global_rng"]


def test_a_misshapen_answer_ends_the_exam():
    with pytest.raises(LearnerCheckError, match=r"\(B, Q\) = \(3, 4\).*\n.*other checks were not run") as caught:
        check_learner(broken.WrongShape, LINEAR)
    assert list(caught.value.failures) == ["answer_shape"]


def test_label_permutation_is_optional():
    assert check_learner(ProtoNet, CLASSES, checks=["label_permutation"]) is None
    with pytest.raises(LearnerCheckError, match="classes renamed"):
        check_learner(MAML, CLASSES, checks=["label_permutation"])


def test_too_few_classes_are_seen():
    class Binary(ProtoNet):
        def adapt(self, support: Examples):
            return super().adapt(support)[:, :2]

    with pytest.raises(LearnerCheckError, match=r"raised|must sum to 1"):
        check_learner(Binary, CLASSES)


def test_wrong_subjects_are_refused():
    with pytest.raises(TypeError, match="learner must be a Learner or a function"):
        check_learner(lambda spec: torch.nn.Linear(1, 1), LINEAR)
    with pytest.raises(TypeError, match=r"tasks must be a TaskDistribution; got the class itself: Sinusoid\(\)"):
        check_learner(MAML, Sinusoid)
    with pytest.raises(ValueError, match="learner must be built for the tasks' spec"):
        check_learner(MAML(Sinusoid().spec), LINEAR)
    with pytest.raises(TypeError, match="tasks must be a TaskDistribution; got MAML"):
        check_tasks(MAML(LINEAR.spec))


def test_errors_travel_between_processes():
    error = LearnerCheckError("MAML", {"sizes": "no"}, "note")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.failures == {"sizes": "no"}


def test_float64_learners_are_examined_too():
    assert check_learner(broken.HonestStream(LINEAR.spec).double(), LINEAR) is None


def test_parametrize_names_each_check_and_leaves_out_what_a_learner_does_not_serve():
    mark = parametrize_with_checks({"MAML": MAML, "ProtoNet": ProtoNet}, {"linear": LINEAR, "classes": CLASSES}).mark
    name, parameters = mark.args
    ids = [parameter.id for parameter in parameters]
    assert name == "check"
    assert len(ids) == len(set(ids)) == 3 * (len(LEARNER_CHECKS) - 1)
    assert "MAML-linear-masked_rows" in ids
    assert not [i for i in ids if i.startswith("ProtoNet-linear")]


def test_parametrized_checks_run_one_at_a_time_and_mark_expected_failures():
    expected = {"dead-linear": {"meta_gradient": "known"}}
    learners = {"dead": broken.DeadParameter}
    mark = parametrize_with_checks(learners, {"linear": LINEAR}, expected_failures=expected).mark
    found = {parameter.id.split("-")[-1]: parameter for parameter in mark.args[1]}
    (known,) = found["meta_gradient"].marks
    assert (known.name, known.kwargs["strict"], known.kwargs["reason"]) == ("xfail", True, "known")
    assert found["sizes"].values[0]() is None
    with pytest.raises(LearnerCheckError, match="unused"):
        found["meta_gradient"].values[0]()


def test_parametrize_refuses_what_would_never_run():
    with pytest.raises(ValueError, match=r"\['ProtoNet'\] have none"):
        parametrize_with_checks({"ProtoNet": ProtoNet}, {"linear": LINEAR})
    with pytest.raises(ValueError, match="did you mean 'MAML'"):
        parametrize_with_checks({"MAML": MAML}, {"linear": LINEAR}, expected_failures={"MAMLs": {"sizes": "?"}})


@pytest.mark.parametrize("tasks", [Sinusoid(), LINEAR, CLASSES, Pool()], ids=lambda t: type(t).__name__)
def test_bundled_families_pass(tasks):
    assert check_tasks(tasks) is None


class Stream(TaskDistribution):
    """Classes that come as they come: n_way times n_shot rows, however many of each class."""

    spec = TaskSpec("classification", (4,), n_way=3, ordered=True)

    def __init__(self, rows_per_shot=3):
        self.rows_per_shot = rows_per_shot

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        return Episode(*(self.part((n_tasks, self.rows_per_shot * n), generator) for n in (n_shot, n_query)))

    def part(self, shape, generator):
        y = torch.randint(3, shape, generator=generator)
        return Examples(torch.randn(*shape, 4, generator=generator) + y[..., None], y)


def test_classes_of_a_stream_come_as_they_come():
    assert check_tasks(Stream()) is None
    with pytest.raises(TaskCheckError) as caught:
        check_tasks(Stream(rows_per_shot=1))
    assert caught.value.failures.keys() == {"counts"}
    assert "n_shot = 2 must give 6 real rows per task (n_way = 3 times as many in a stream); got 2 to 2" in str(
        caught.value
    )


class TooFewShots(Pool):
    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        return super().sample(n_tasks, split=split, n_shot=1, n_query=n_query, generator=generator)


class SortedRows(Pool):
    def part(self, ids, generator):
        y = torch.arange(2)[:, None].expand(ids.shape).flatten(1)
        return Examples(self.rows[ids.flatten(1)], y, ids=ids.flatten(1))


class SortedTargets(Sinusoid):
    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        episode = super().sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)
        query = episode.query
        order = query.y[..., 0].argsort(1)[..., None]
        return type(episode)(
            episode.support, Examples(query.x.gather(1, order), query.y.gather(1, order)), episode.latents
        )


class UsesGlobal(Pool):
    def part(self, ids, generator):
        torch.rand(1)
        return super().part(ids, generator)


class Counts(Pool):
    calls = 0

    def part(self, ids, generator):
        self.calls += 1
        rows = super().part(ids, generator)
        return Examples(rows.x + self.calls, rows.y, ids=rows.ids)


class IgnoresGenerator(Pool):
    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        fixed = torch.Generator().manual_seed(0)
        return super().sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=fixed)


class KnowsItsProcess(Pool):
    def part(self, ids, generator):
        rows = super().part(ids, generator)
        return Examples(rows.x + os.getpid(), rows.y, ids=rows.ids)


class RepeatsRows(Pool):
    def part(self, ids, generator):
        return super().part(ids.roll(1, 2) * 0 + ids[..., :1], generator)


class WrongSpec(Pool):
    def __init__(self):
        super().__init__()
        self.spec = TaskSpec("classification", (4,), n_way=2)


class NanReference(Sinusoid):
    def references(self):
        return {"nan": broken.NotFinite(self.spec)}


@pytest.mark.parametrize(
    ("tasks", "check", "related"),
    [
        (TooFewShots(), "counts", set()),
        (SortedRows(), "row_order", set()),
        (SortedTargets(), "row_order", set()),
        (UsesGlobal(), "global_rng", set()),
        (Counts(), "deterministic", {"addressed"}),
        (Counts(), "addressed", {"deterministic"}),
        (IgnoresGenerator(), "deterministic", {"row_order"}),
        (KnowsItsProcess(), "addressed", set()),
        (Pool(repeat=True), "rows_disjoint", set()),
        (Pool(repeat=True, named=False), "rows_disjoint", set()),
        (RepeatsRows(), "rows_disjoint", set()),
        (Pool({**OWNED, "test": [9, 10, 0]}), "splits_disjoint", set()),
        (WrongSpec(), "spec", set()),
        (NanReference(), "references", set()),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, (Pool, Sinusoid)) else v if isinstance(v, str) else "",
)
def test_broken_families_are_caught(tasks, check, related):
    with pytest.raises(TaskCheckError) as caught:
        check_tasks(tasks)
    assert check in caught.value.failures
    assert set(caught.value.failures) <= {check, *related}


class Visits(TaskDistribution):
    """As many rows as a task happens to have: chunks are as wide as their longest task."""

    spec = TaskSpec("regression", (2,), y_dim=1)
    shift = 0.0

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        parts = []
        for _ in range(2):
            counts = torch.randint(1, 200, (n_tasks,), generator=generator)
            width = int(counts.max())
            x = torch.rand(n_tasks, width, 2, generator=generator) + self.shift
            parts.append(Examples(x, x[..., :1], torch.arange(width) < counts[:, None]))
        return Episode(*parts, {"of each row": parts[0].x, "counts": parts[0].real.sum(1)})


class DriftingVisits(Visits):
    def sample(self, *args, **options):
        self.shift += 1.0
        return super().sample(*args, **options)


def test_ragged_families_are_addressed_however_wide_their_chunks_are():
    stream = EpisodeStream(Visits(), seed=0, split="train", n_shot=2, n_query=3)
    assert stream[0].support.n_rows != stream[1].support.n_rows
    assert check_tasks(Visits(), checks=["spec", "deterministic", "addressed"]) is None
    with pytest.raises(TaskCheckError, match="64 of 64 tasks differ between batches of 1"):
        check_tasks(DriftingVisits(), checks=["addressed"])


@pytest.mark.parametrize("rows", [[0, 1], [0, 0, 1], [0, 1, 0, 1]])
def test_shuffled_rows_are_seldom_taken_for_ordered_ones(rows):
    """Few rows have few degrees of freedom: beyond six standard deviations lay one of a hundred honest families."""
    source, shape = torch.Generator().manual_seed(0), (500, 300, len(rows))
    order = torch.rand(shape, generator=source).argsort(-1)
    found = [_chi_square(labels) for labels in torch.tensor(rows).expand(shape).gather(-1, order)]
    alarms = sum(statistic > _highest(expected, len(rows)) for statistic, expected in found)
    assert alarms == 0
    assert 0.9 < sum(statistic for statistic, _ in found) / sum(expected for _, expected in found) < 1.1


def test_expected_failures_of_families_are_strict():
    known = {"row_order": "rows come by class"}
    assert check_tasks(SortedRows(), expected_failures=known) is None
    with pytest.raises(TaskCheckError, match="was expected to fail"):
        check_tasks(Pool(), expected_failures=known)


def test_every_check_says_what_it_asks_for():
    for text in (*LEARNER_CHECKS.values(), *TASK_CHECKS.values()):
        assert text.endswith(".")
        assert len(text) > 20


class AssertsItsShape(broken.Honest):
    def adapt(self, support: Examples):
        assert support.n_rows > 100
        return super().adapt(support)


class Complex(broken.Honest):
    def __init__(self, spec):
        super().__init__(spec)
        self.phase = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))


def test_an_assertion_of_the_learner_is_told_with_its_place():
    with pytest.raises(LearnerCheckError, match=r"raised Assert(.|\n)*\(test_testing.py, line \d+, in adapt\)"):
        check_learner(AssertsItsShape, LinearRegression(dim=2))


def test_complex_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match=r"Complex has complex ones, such as \['phase'\]"):
        check_learner(Complex, LinearRegression(dim=2))
