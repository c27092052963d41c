"""Checks of what a learner leaves alone, and of what it can live with: modes, precision, checkpoints."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metaicl.checkpoint import load_weights
from metaicl.episode import Episode
from metaicl.exam.case import SEED, Case, answer, difference, precision_of, require_same
from metaicl.exam.learning import meta_gradients
from metaicl.exam.randomness import global_generators_used, private_randomness
from metaicl.learner import Learner, PredictsPrefixes, Prepares, Updates
from metaicl.task import Split, TaskDistribution
from metaicl.training import training_mode


def check_module_untouched(case: Case) -> None:
    """Adapting and predicting change no parameter, buffer or `.grad`, in neither mode."""
    for training in (False, True):
        learner = copy.deepcopy(case.learner).train(training)
        before = {name: value.detach().clone() for name, value in _tensors(learner)}
        answer(learner, case.episode.support, case.episode.query.x)
        after = dict(_tensors(learner))
        changed = [
            n for n in {**before, **after} if n not in before or n not in after or not _equal(before[n], after[n])
        ]
        graded = [name for name, value in learner.named_parameters() if value.grad is not None]
        if changed or graded:
            mode = "train" if training else "eval"
            what = f"values of {changed[:5]}" if changed else f".grad of {graded[:5]}"
            raise AssertionError(
                f"adapt and predict in {mode} mode changed {what}. Hint: fast weights are a return value "
                "(torch.func.functional_call), and running statistics have no place in a learner"
            )


def check_episode_untouched(case: Case) -> None:
    """Adapting and predicting write into no tensor of the episode."""
    before = case.episode.fingerprint()
    case.answer()
    if case.episode.fingerprint() != before:
        raise AssertionError(
            "adapt or predict changed the episode's tensors. Hint: no in-place operation on what is passed in"
        )


def check_train_mode(case: Case) -> None:
    """Adapting and predicting leave the train or eval mode of every submodule as they found it."""
    for training in (True, False):
        learner = copy.deepcopy(case.learner).train(training)
        answer(learner, case.episode.support, case.episode.query.x)
        flipped = [name or type(learner).__name__ for name, m in learner.named_modules() if m.training != training]
        if flipped:
            raise AssertionError(
                f"train({training}) became train({not training}) in {flipped[:5]}. Hint: the mode belongs to the caller"
            )


def check_global_rng(case: Case) -> None:
    """No global random generator is read or seeded in eval mode; in train mode torch's is read, but not seeded."""
    used = global_generators_used(case.answer)
    if used:
        raise AssertionError(
            f"adapt or predict changed the global generator of {' and '.join(used)} in eval mode. "
            "Hint: draw from a torch.Generator of your own, or at construction"
        )
    states = []
    for seed in (1, 2):
        with private_randomness(seed=seed), training_mode(case.learner):
            used = set(global_generators_used(case.answer)) & {"numpy", "random"}
            states.append(torch.get_rng_state())
        if used:
            raise AssertionError(
                f"adapt or predict changed the global generator of {' and '.join(sorted(used))} in train mode. Hint: "
                "draw from torch's, which training seeds for each update, so that a run can be repeated and resumed"
            )
    if torch.equal(*states):
        raise AssertionError(
            "adapt or predict seeded torch's global generator in train mode: all noise that follows is the same in "
            "every update. Hint: noise in train mode comes from the global generator as it is, which training seeds"
        )


def check_history(case: Case) -> None:
    """Answers and meta-gradients, in either mode, do not depend on what the learner was called with before."""
    learner, modes = case.learner, {"eval": False, "train": True}
    expected = {mode: _said(copy.deepcopy(learner).train(on), case.episode) for mode, on in modes.items()}
    for on in (True, False):
        _use(learner.train(on), case.short)
    hint = (
        "keep nothing between calls, neither on self nor on the class. What is measured once belongs into a buffer "
        "that prepare fills; noise in train mode comes from torch's global generator, seeded for each update"
    )
    for mode, on in modes.items():
        now = _said(learner.train(on), case.episode)
        for what, before in expected[mode].items():
            require_same(f"{what} in {mode} mode, before and after other episodes", before, now[what], hint)


def check_no_grad(case: Case) -> None:
    """Evaluation contexts change no number."""
    expected = case.answer()
    hint = "an inner loop takes its gradients with torch.func.grad, or turns them on itself by torch.enable_grad()"
    with torch.no_grad():
        require_same("under torch.no_grad()", expected, case.answer(), hint)
    with torch.inference_mode():
        require_same("under torch.inference_mode()", expected, case.answer().clone(), hint)


def check_state_dict(case: Case) -> None:
    """Weights loaded into a newly built learner (a copy with other weights, if the exam was given a ready one)."""
    learner = case.learner
    with private_randomness(seed=1):  # other weights than those the exam began with
        other = copy.deepcopy(learner if case.build is None else case.build(learner.spec))
    other.eval().to(dtype=precision_of(learner))
    with torch.no_grad():
        for value in other.state_dict().values():  # buffers that are not persistent are constants, made anew
            if isinstance(value, Tensor) and value.is_floating_point():
                value.add_(1.0)
    load_weights(other, learner.state_dict(), source="state_dict()")  # buffers may have grown
    support, x = case.episode.support, case.episode.query.x
    hint = "everything that shapes an answer is a parameter or a persistent buffer"
    require_same("a state_dict round trip", case.answer(), answer(other, support, x), hint)


def check_float64(case: Case) -> None:
    """`learner.double()` answers float64 episodes in float64, with the same numbers up to float32 rounding."""
    double = copy.deepcopy(case.native).double()
    hint = "make new tensors with the dtype of the inputs (x.new_zeros, torch.eye(n, dtype=x.dtype)), cast nothing"
    found = []
    for episode in (case.episode, case.short):  # a choice between near equals, such as of what is retrieved, may flip
        native: Episode = episode.to(dtype=precision_of(case.native))
        wide = native.to(dtype=torch.float64)
        expected = answer(case.native, native.support, native.query.x)
        got = answer(double, wide.support, wide.query.x)
        if got.dtype != torch.float64 and wide.query.x.is_floating_point():
            raise AssertionError(f"the answer to a float64 episode must be float64; got {got.dtype}. Hint: {hint}")
        found.append(difference(expected, got.to(expected.dtype)))
    if None not in found:
        raise AssertionError(f"float32 and float64: {found[0]}. Hint: {hint}")


def check_prepare_split(case: Case) -> None:
    """`prepare` samples meta-training tasks only."""
    learner = case.native
    if not isinstance(learner, Prepares):
        return
    spy = _SplitSpy(case.tasks)
    learner.prepare(spy, seed=SEED)
    if spy.splits - {"train"}:
        raise AssertionError(
            f"prepare must sample the train split only; it sampled {sorted(spy.splits)}. Hint: anything else is leakage"
        )


class _SplitSpy(TaskDistribution):
    """The same tasks, noting which splits are sampled."""

    def __init__(self, tasks: TaskDistribution) -> None:
        self._tasks, self.splits = tasks, set[str]()
        # What the base class has too would not be looked for in the tasks.
        self.spec, self.source_classes, self.discrete = tasks.spec, tasks.source_classes, tasks.discrete
        self.identity = tasks.identity

    def sample(self, n_tasks: int, *, split: Split, n_shot: int, n_query: int, generator: torch.Generator) -> Episode:
        self.splits.add(split)
        return self._tasks.sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)

    def references(self) -> Mapping[str, Learner]:
        return self._tasks.references()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tasks"], name)


def _said(learner: Learner, episode: Episode) -> dict[str, Tensor]:
    """All that a learner says of an episode, by name: its answers, and its meta-gradients."""
    with private_randomness():
        said = {"the answer": answer(learner, episode.support, episode.query.x)}
    if learner.traits.trainable:
        with private_randomness():
            found = meta_gradients(learner, episode)
        said |= {f"the meta-gradient of {name}": value for name, value in found.items()}
    return said


def _use(learner: Learner, episode: Episode) -> None:
    """Call whatever a learner may keep something in."""
    _said(learner, episode)
    with private_randomness():
        if isinstance(learner, Updates):
            learner.update(learner.adapt(episode.support), episode.query)
        if isinstance(learner, PredictsPrefixes):
            learner.predict_prefixes(episode.query)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
