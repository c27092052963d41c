"""Every way of breaking the contract is caught by the check that is meant for it, and by few others."""

from typing import Any

import broken_learners as broken
import pytest

from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.tasks.functions import LinearRegression, Sinusoid
from metaicl.testing import LEARNER_CHECKS, LearnerCheckError, check_learner

TASKS = LinearRegression(dim=2, noise=0.1)

# The learner, the check that must catch it, and what else its fault spoils.
FAULTS: list[tuple[type[Learner], str, set[str]]] = [
    (broken.MutatesWeights, "module_untouched", set()),
    (broken.WritesGradients, "module_untouched", {"no_grad"}),
    (broken.RunningStatistics, "module_untouched", set()),
    (broken.WritesIntoEpisode, "episode_untouched", set()),
    (broken.IgnoresSupport, "support_used", {"meta_gradient", "learns"}),
    (broken.IgnoresSupport, "learns", {"meta_gradient", "support_used"}),
    (broken.DeniesItsSupport, "support_used", set()),
    (broken.PeeksAtQueries, "query_independence", set()),
    (broken.MixesEpisodes, "episode_independence", {"batch_equals_loop", "batch_gradient", "masked_rows"}),
    (broken.MixesEpisodes, "batch_equals_loop", {"episode_independence", "batch_gradient", "masked_rows"}),
    (broken.ConsumesGlobalRng, "global_rng", set()),
    (broken.SeedsGlobalRng, "global_rng", set()),
    (broken.SeedsWhileTraining, "global_rng", set()),
    (broken.DrawsElsewhereWhileTraining, "global_rng", {"history"}),
    (broken.NotFinite, "answer_finite", {"sizes", "support_used", "meta_gradient", "gradient_slope", "learns"}),
    (broken.WrongShape, "answer_shape", set()),
    (broken.ReturnsTensor, "answer_shape", set()),
    (broken.WithoutMean, "answer_shape", set()),
    (broken.DeadParameter, "meta_gradient", set()),
    (broken.DetachedState, "meta_gradient", {"gradient_slope"}),
    (broken.HalfDetachedState, "gradient_slope", set()),
    (broken.OnceDifferentiable, "gradient_slope", set()),
    (broken.DoublesTheGradient, "batch_gradient", {"gradient_slope"}),
    (broken.TrainableReference, "meta_gradient", set()),
    (broken.NeedsGradMode, "no_grad", {"gradient_slope"}),
    (broken.OrderSensitive, "support_order", set()),
    (broken.IgnoresMask, "masked_rows", set()),
    (broken.NeedsNoMask, "full_mask", {"masked_rows", "support_order"}),
    (broken.KeepsState, "state_returned", set()),
    (broken.KeepsAnAverage, "history", set()),
    (broken.FitsAtFirstCall, "history", set()),
    (broken.AnnealsItsPenalty, "history", set()),
    (broken.Float32Only, "float64", set()),
    (broken.RoundsToFloat32, "float64", set()),
    (broken.FlipsMode, "train_mode", set()),
    (broken.HiddenTensor, "state_dict", set()),
    (broken.HiddenBuffer, "state_dict", set()),
    (broken.FixedSizes, "sizes", {"query_independence"}),
    (broken.DividesByOneLess, "sizes", set()),
    (broken.ForgetsInUpdate, "update", set()),
    (broken.MergesWithoutWeights, "merge", set()),
    (broken.PrefixesSeeTheAnswer, "predict_prefixes", set()),
    (broken.PrefixesCountMaskedRows, "predict_prefixes", set()),
    (broken.UpdatesWithMaskedRows, "update", set()),
    (broken.ClimbsTheLoss, "learns", set()),
    (broken.ReadsTestTasks, "prepare_split", set()),
]


@pytest.mark.parametrize(("learner", "check", "related"), FAULTS, ids=lambda v: getattr(v, "__name__", None))
def test_fault_is_caught_by_its_check(learner: type[Learner], check: str, related: set[str]) -> None:
    with pytest.raises(LearnerCheckError) as caught:
        check_learner(learner, TASKS)
    failures = caught.value.failures
    assert check in failures
    assert set(failures) <= {check, *related}
    assert "Hint: " in failures[check] or "raised" in failures[check]


def test_non_deterministic_learner_is_caught() -> None:
    with pytest.raises(LearnerCheckError) as caught:
        check_learner(broken.NonDeterministic, TASKS)
    assert "asking one state twice" in caught.value.failures["same_answer_twice"]
    untouched = {"answer_shape", "answer_finite", "module_untouched", "episode_untouched", "train_mode", "global_rng"}
    assert not untouched & set(caught.value.failures)


@pytest.mark.parametrize(
    ("learner", "check", "message"),
    [
        (broken.UpdatesInPlace, "update", "the state before update: .* Hint: update returns a new state"),
        (broken.ShortPrefixes, "predict_prefixes", r"predict_prefixes must return batch shape \(B, Q\) = .* got"),
        (broken.Float32Only, "float64", r"raised RuntimeError: .* \(broken_learners.py, line \d+, in rows\)"),
    ],
)
def test_the_message_leads_to_the_fault(learner: type[Learner], check: str, message: str) -> None:
    with pytest.raises(LearnerCheckError, match=message):
        check_learner(learner, TASKS, checks=["answer_shape", check])


def test_every_check_has_a_fault_that_it_catches() -> None:
    elsewhere = {"same_answer_twice", "label_permutation"}  # caught above; optional, see test_testing.py
    assert {check for _, check, _ in FAULTS} | elsewhere == set(LEARNER_CHECKS)


@pytest.mark.parametrize(
    "learner",
    [
        broken.Honest,
        broken.HonestStream,
        broken.NoiseInTraining,
        broken.GrowingBuffer,
        broken.ConstantBuffer,
        broken.DeclaredTransductive,
        broken.DeclaredPeeker,
        broken.DeclaredApproximate,
    ],
)
def test_honest_learners_pass(learner: type[Learner]) -> None:
    assert check_learner(learner, TASKS) is None


class PositiveTargets(Sinusoid):
    """Targets above zero."""

    def sample(self, *arguments: Any, **sizes: Any) -> Episode:
        drawn = super().sample(*arguments, **sizes)
        parts = (Examples(part.x, part.y.exp()) for part in (drawn.support, drawn.query))
        return Episode(*parts, drawn.latents)


def test_densities_are_asked_within_their_support() -> None:
    either_sign = {"learns": "its easy tasks have targets of either sign"}
    assert check_learner(broken.PositiveAnswers, PositiveTargets(), expected_failures=either_sign) is None


def test_prepare_may_read_what_tasks_say_of_themselves() -> None:
    assert check_learner(broken.StudiesItsTasks, TASKS, checks=["prepare_split"]) is None
