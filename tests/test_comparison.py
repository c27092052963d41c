import json
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch

from metaicl.comparison import compare
from metaicl.episode import Episode, Examples
from metaicl.files import lock_directory
from metaicl.functional import gaussian, masked_mean
from metaicl.inner_loop.optimizers import SGD
from metaicl.learner import Learner, Traits
from metaicl.learners import ProtoNet
from metaicl.learners.gradient.maml import MAML
from metaicl.meta_training import meta_train
from metaicl.objectives import squared_error
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import TaskDistribution
from metaicl.tasks import GaussianClasses
from metaicl.train_config import TrainConfig


class Levels(TaskDistribution):
    spec = TaskSpec("regression", (1,), y_dim=1)

    def __init__(self, noise=0.1):
        self.noise = noise

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        level = torch.randn(n_tasks, 1, 1, generator=generator)
        rows = [torch.randn(n_tasks, n, 1, generator=generator) for n in (n_shot, n_query)]
        return Episode(*(Examples(torch.zeros_like(row), level + self.noise * row) for row in rows))

    def references(self):
        return {"closed form": Mean(self.spec)}


class Mean(Learner):
    traits = Traits(trainable=False)

    def adapt(self, support):
        return masked_mean(support.y, support.mask, 1)

    def predict(self, state, x):
        mean = state[:, None].expand(-1, x.shape[1], -1)
        return gaussian(mean, torch.full_like(mean, 0.1))


class Scaled(Mean):
    """The mean times a weight that training brings to one."""

    traits = Traits()

    def __init__(self, spec):
        super().__init__(spec)
        self.weight = torch.nn.Parameter(1 + torch.randn(()))

    def adapt(self, support):
        return self.weight * super().adapt(support)


class OnlyClasses(Scaled):
    traits = Traits(kinds=("classification",), instead=(("regression", "Scaled"),))


class Diverging(Scaled):
    """Fine in training, NaN afterwards."""

    def predict(self, state, x):
        return super().predict(state if self.training else state * float("nan"), x)


class Random(Scaled):
    """Nothing to train, but parameters that are drawn."""

    traits = Traits(trainable=False)


class Trainer:
    """Stands in for meta_train: notes what it was asked for, and moves the weight half the way to one."""

    def __init__(self):
        self.calls = []

    def __call__(self, learner, tasks, config, *, directory=None, progress=True):
        self.calls.append((type(learner).__name__, config.seed, learner.weight.item(), directory))
        with torch.no_grad():
            learner.weight.lerp_(torch.ones(()), 0.5)
        return SimpleNamespace(history=[{"step": 1, "loss": 2.0, "seconds": 0.1}], seconds=0.5, steps_done=1)


CONFIG = TrainConfig(steps=2, meta_batch_size=4, n_shot=3, n_query=4, validate_every=None)
SIZES = {"train": CONFIG, "n_episodes": 20, "seeds": 2, "progress": False}


def test_seeds_can_be_an_array(tmp_path):
    sizes = {**SIZES, "n_episodes": 2, "directory": tmp_path}
    report = compare({"a": Scaled}, Levels(), trainer=Trainer(), **{**sizes, "seeds": np.array([1, 2])})
    again = compare({"a": Scaled}, Levels(), trainer=Trainer(), **{**sizes, "seeds": [1, 2]})
    assert report.rows("Levels")[0].seeds == again.rows("Levels")[0].seeds == (1, 2)
    with pytest.raises(TypeError, match=r"seeds must be an int >= 1; got 1\.5"):
        compare({"a": Scaled}, Levels(), trainer=Trainer(), **{**sizes, "seeds": 1.5})


def test_every_learner_is_trained_once_per_seed_from_the_same_address():
    trainer = Trainer()
    report = compare({"a": Scaled, "b": lambda spec: Scaled(spec)}, Levels(), trainer=trainer, **SIZES)
    assert [call[:2] for call in trainer.calls] == [("Scaled", 0), ("Scaled", 1)] * 2
    assert trainer.calls[0][2] == trainer.calls[2][2] != trainer.calls[1][2]
    assert report.values("Levels", "a").shape == (2, 20)
    assert report.differences("Levels", baseline="a")["b", "a"].mean == 0.0
    rows = {row.learner: row for row in report.rows("Levels")}
    assert rows["a"].seeds == (0, 1)
    assert rows["a"].train_seconds == 0.5
    assert rows["closed form"].seeds == (None,)
    assert rows["a"].regret is not None
    assert rows["a"].regret.mean > 0


def test_the_real_trainer_is_the_default_and_learns():
    config = TrainConfig(
        steps=100,
        meta_batch_size=100,
        outer_lr=0.1,
        schedule="cosine",
        n_shot=3,
        n_query=4,
        validate_every=None,
        log_every=10,
    )
    report = compare({"a": Scaled}, Levels(), train=config, n_episodes=50, seeds=2, progress=False)
    result = report.of("Levels", "a")[0]
    assert result.steps == 100
    assert result.history["step"][-1] == 100
    assert result.budget["steps"] == 100
    best = report.values("Levels", "closed form").mean()
    assert report.values("Levels", "a").mean() == pytest.approx(best, rel=0.05)


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    compare({"a": Scaled}, Levels(), trainer=Trainer(), **SIZES)
    assert torch.equal(torch.get_rng_state(), before)


def test_refusing_and_diverging_learners_do_not_stop_the_others():
    learners = {"no": OnlyClasses, "nan": Diverging, "yes": Scaled}
    report = compare(learners, Levels(), references=False, **SIZES)
    rows = {row.learner: row for row in report.rows("Levels")}
    assert (rows["no"].status, rows["nan"].status, rows["yes"].status) == ("not served", "failed", "finished")
    assert "OnlyClasses serves classification, not regression; use Scaled instead" in rows["no"].note
    assert "FloatingPointError: nan failed in episodes" in rows["nan"].note
    assert "(seed 1)" in rows["nan"].note


def test_errors_of_a_learner_that_are_no_divergence_are_not_hidden():
    def broken(learner, tasks, config, **options):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit") as raised:
        compare({"a": Scaled}, Levels(), trainer=broken, **SIZES)
    assert "raised by 'a' on 'Levels', seed 0" in raised.value.__notes__[0]


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_learner_that_needs_too_much_memory_does_not_stop_the_others(error):
    class Large(Scaled):
        def adapt(self, support):
            raise error

    report = compare({"large": Large, "a": Scaled}, Levels(), trainer=Trainer(), **SIZES)
    assert {row.learner: row.status for row in report.rows("Levels")}["large"] == "failed"
    assert report.best("Levels") == "a"


def test_an_instance_is_judged_as_it_is_and_left_as_it_is():
    learner, trainer = Scaled(Levels.spec), Trainer()
    weight = learner.weight.item()
    report = compare({"mine": learner}, Levels(), trainer=trainer, **SIZES)
    assert trainer.calls == []
    assert learner.weight.item() == weight
    assert report.rows("Levels")[0].seeds_text == "fixed"
    assert report.of("Levels", "mine")[0].train_seconds is None


def test_an_instance_for_other_tasks_is_not_served():
    report = compare({"mine": Mean(TaskSpec("regression", (3,), y_dim=1))}, Levels(), **SIZES)
    assert report.rows("Levels")[0].status == "not served"
    assert "mine was built for x_shape (3,); the tasks have x_shape (1,)" in report.rows("Levels")[0].note


def test_a_fault_in_a_factory_is_not_taken_for_a_learner_of_other_tasks():
    trainer, elsewhere = Trainer(), TaskSpec("regression", (3,), y_dim=1)
    faults = [
        (lambda spec: maml(inner_lr=-1.0), "inner_lr must be"),
        (
            lambda spec: Scaled(elsewhere),
            r"learners\['faulty'\] must give a learner for TaskSpec.*got one for TaskSpec",
        ),
    ]
    for faulty, message in faults:
        with pytest.raises(ValueError, match=message) as raised:
            compare({"a": Scaled, "faulty": faulty}, Levels(), trainer=trainer, **SIZES)
        assert not isinstance(raised.value, NotServed)
        assert "raised by building 'faulty' for 'Levels'" in raised.value.__notes__[0]
    assert trainer.calls == []


def test_untrained_learners_run_per_seed_only_if_something_is_drawn():
    report = compare({"drawn": Random, "fixed": Mean}, Levels(), trainer=Trainer(), **SIZES)
    assert [row.seeds for row in report.rows("Levels")] == [(0, 1), (None,), (None,)]


def test_nothing_to_train_needs_no_budget_but_the_numbers_of_rows():
    report = compare({"a": Mean}, Levels(), n_shot=2, n_query=3, n_episodes=5, progress=False)
    assert report.protocol["training_budget"] == "nothing was trained"
    with pytest.raises(ValueError, match="n_shot must be given for 'Levels': there is no budget"):
        compare({"a": Mean}, Levels(), n_episodes=5, progress=False)


def test_a_reference_never_takes_the_name_of_a_learner():
    names = ("closed form", "closed form (reference)")
    report = compare(dict.fromkeys(names, Scaled), Levels(), trainer=Trainer(), **SIZES)
    rows = {row.learner: (row.role, row.seeds) for row in report.rows("Levels")}
    assert rows.pop("closed form (reference) (reference)") == ("reference", (None,))
    assert rows == dict.fromkeys(names, ("learner", (0, 1)))


def test_the_card_names_the_batch_sizes_that_seconds_were_measured_with(tmp_path):
    for size, seeds, told in ((7, 1, [7]), (50, 2, [7, 50])):
        sizes = {**SIZES, "batch_size": size, "seeds": seeds, "directory": tmp_path}
        assert (
            compare({"a": Scaled}, Levels(), trainer=Trainer(), references=False, **sizes).protocol["batch_size"]
            == told
        )


def test_one_seed_is_never_certain():
    report = compare({"a": Scaled}, Levels(), trainer=Trainer(), **{**SIZES, "seeds": 1})
    assert report.rows("Levels")[0].seeds_text == "n/a (1 seed)"
    assert "n/a (1 seed)" in str(report)
    assert report.interval("Levels", "a").covers == "episodes"


def test_several_distributions_budgets_and_shots():
    small = TrainConfig(steps=1, n_shot=(1, 3), n_query=4, validate_every=None)
    report = compare(
        {"a": Scaled, "b": Scaled},
        {"quiet": Levels(), "loud": Levels(1.0)},
        train={"quiet": CONFIG, "loud": small, ("quiet", "b"): small},
        n_episodes=20,
        seeds=[3, 5],
        shots=(1, 5),
        trainer=Trainer(),
        progress=False,
    )
    assert [result.budget["steps"] for result in report.results if result.budget] == [2, 2, 1, 1, 1, 1, 1, 1]
    assert report.shots("quiet") == [1, 3, 5]
    assert report.rows("quiet")[0].seeds == (3, 5)
    means = [report.values("quiet", "closed form", shots=k).mean() for k in (1, 3, 5)]
    assert means == sorted(means, reverse=True)
    assert report.values("loud", "closed form").mean() > 10 * report.values("quiet", "closed form").mean()
    assert report.protocol["training_budget"]["quiet, b"]["steps"] == 1


def test_a_killed_comparison_continues(tmp_path):
    def call_or_die(self, *args, **options):
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return call(self, *args, **options)

    learners, killed, trainer, call = {"a": Scaled, "b/..": Scaled}, Trainer(), Trainer(), Trainer.__call__
    with patch.object(Trainer, "__call__", call_or_die), pytest.raises(KeyboardInterrupt):
        compare(learners, Levels(), trainer=killed, directory=tmp_path / "run", **SIZES)
    again = compare(learners, Levels(), trainer=trainer, directory=tmp_path / "run", **SIZES)
    whole = compare(learners, Levels(), trainer=Trainer(), **SIZES)
    assert [call[1] for call in trainer.calls] == [1]
    assert killed.calls[0][3].is_relative_to(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    for name in ("a", "b/.."):
        assert again.values("Levels", name).tolist() == whole.values("Levels", name).tolist()
    assert again.rows("Levels")[0].difference == whole.rows("Levels")[0].difference


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    sizes = {**SIZES, "n_episodes": 2, "seeds": 1, "directory": tmp_path}
    first = compare({"a": Scaled}, Levels(), trainer=Trainer(), **sizes)
    (stored,) = tmp_path.glob("*/*/seed-0.json")
    (stored.parent / f".{'0' * 32}.partial").write_text('{"settings"')  # a result, as `atomic_write` names it
    mine = [stored.parent / "notes.txt", tmp_path / "mine"]
    for file in mine:
        file.write_text("kept")
    assert compare({"a": Scaled}, Levels(), trainer=Trainer(), **sizes).results == first.results
    assert not list(tmp_path.rglob("*.partial"))
    assert all(file.exists() for file in mine)


def test_the_real_trainer_resumes_in_the_directory(tmp_path):
    config = TrainConfig(steps=3, n_shot=3, n_query=4, validate_every=None, log_every=1)
    runs = [
        compare({"a": Scaled}, Levels(), train=config, seeds=1, n_episodes=5, directory=tmp_path, progress=False)
        for _ in range(2)
    ]
    assert runs[0].values("Levels", "a").tolist() == runs[1].values("Levels", "a").tolist()
    assert list(tmp_path.rglob("learner.ckpt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_episodes": 21}, "n_episodes was 20, is 21"),
        ({"shots": (1,)}, r"shots was \[3\], is \[1, 3\]"),
        ({"train": TrainConfig(steps=3, n_shot=3, n_query=4)}, "train.steps was 2, is 3"),
        ({"tasks": Levels(0.2)}, "example tasks was"),
        ({"learners": {"a": Random}}, r"learner.class was '\S*Scaled', is '\S*Random'"),
    ],
)
def test_results_of_another_comparison_are_not_taken_over(tmp_path, change, message):
    first = {"learners": {"a": Scaled}, "tasks": Levels(), "trainer": Trainer(), "directory": tmp_path, **SIZES}
    compare(**first)
    with pytest.raises(ValueError, match=message):
        compare(**{**first, **change})


def maml(activation=torch.nn.Tanh, spec=Levels.spec, **settings):
    net = torch.nn.Sequential(torch.nn.Linear(1, 4), activation(), torch.nn.Linear(4, 1))
    return MAML(spec, net=net, **settings)


def learner_of(*args, **settings):
    return {"learners": {"a": lambda spec: maml(*args, spec=spec, **settings)}}


class Scales(Scaled):
    def __init__(self, spec, scales=(1.0, 2.0)):
        super().__init__(spec)
        self.scales = scales


class OtherTraining(Levels):
    """Other tasks in training, the same ones in the test."""

    def sample(self, n_tasks, *, split, n_shot, n_query, generator):
        episode = super().sample(n_tasks, split=split, n_shot=n_shot, n_query=n_query, generator=generator)
        episode.query.y.mul_(2 if split == "train" else 1)
        return episode


@pytest.mark.parametrize(
    ("first", "change", "message"),
    [
        (learner_of(inner_lr=0.001), learner_of(inner_lr=0.1), r"lr\.value was 0\.001, is 0\.1"),
        (learner_of(inner_steps=1), learner_of(inner_steps=2), "inner_steps was 1, is 2"),
        (learner_of(first_order=True), learner_of(), "first_order was True, is False"),
        (learner_of(adapt="2.*"), learner_of(), "attributes.adapted was"),
        (learner_of(optimizer=SGD(0.1)), learner_of(optimizer=SGD(0.2)), r"lr\.value was 0\.1, is 0\.2"),
        (learner_of(optimizer=SGD(0.1)), learner_of(optimizer=SGD(0.1, momentum=0.9)), r"momentum\.value was 0\.0"),
        (learner_of(), learner_of(torch.nn.ReLU), r"modules\.net\.modules\.1\.class was '\S*Tanh'"),
        ({"learners": {"a": Scales}}, {"learners": {"a": partial(Scales, scales=(-3.0, 2.0))}}, "scales was"),
        (
            {},
            {"trainer": partial(meta_train, objective=squared_error)},
            "trainer was 'metaicl.meta_training.meta_train",
        ),
        ({}, {"tasks": {"Levels": OtherTraining()}}, "first training episode was"),
    ],
)
def test_every_setting_counts(tmp_path, first, change, message):
    train = TrainConfig(steps=1, meta_batch_size=2, n_shot=2, n_query=2, validate_every=None)
    given = {"learners": {"a": Scaled}, "tasks": Levels(), "references": False, "directory": tmp_path, "train": train}
    given |= {"n_episodes": 4, "seeds": 1, "progress": False, **first}
    report = compare(**given)
    assert compare(**given).values("Levels", "a").tolist() == report.values("Levels", "a").tolist()
    with pytest.raises(ValueError, match=message):
        compare(**{**given, **change})


@pytest.mark.parametrize("processes", [1, 2])
def test_a_new_process_takes_over_what_stands_there(tmp_path, processes):
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = []
    for seed, number in (("1", 1), ("77", processes)):
        paths = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "program.py", str(number)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]


PROGRAM = """
import sys
from functools import partial
import torch
from metaicl import MAML, Sinusoid, TrainConfig, compare

class Own(MAML):
    def __init__(self, spec):
        super().__init__(spec, adapt={"head.*", "encoder.*"})
        self.words = {"some", "words", "in", "a", "set"}

if __name__ == "__main__":
    torch.set_num_threads(1)
    train = TrainConfig(steps=2, meta_batch_size=2, n_shot=2, n_query=2, validate_every=None)
    report = compare({"a": Own, "b": Own}, Sinusoid(), train=train, n_episodes=4, seeds=1, references=False,
                     directory="run", processes=int(sys.argv[1]), progress=False)
    rows = [report.of("Sinusoid", name)[0] for name in "ab"]
    print([(row.train_seconds, row.history) for row in rows])  # of the run that was, not of another
"""


def test_a_directory_in_use_is_refused(tmp_path):
    with lock_directory(tmp_path), pytest.raises(BlockingIOError, match="in use"):
        compare({"a": Mean}, Levels(), directory=tmp_path, **SIZES)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="must be a directory or nothing yet"):
        compare({"a": Mean}, Levels(), directory=tmp_path / "file", **SIZES)


def test_a_damaged_result_is_named(tmp_path):
    compare({"a": Mean}, Levels(), directory=tmp_path, references=False, **SIZES)
    path = next(tmp_path.rglob("fixed.json"))
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"fixed\.json is damaged; remove it"):
        compare({"a": Mean}, Levels(), directory=tmp_path, references=False, **SIZES)


def test_a_result_is_json_that_others_can_read(tmp_path):
    compare({"a": Mean}, Levels(), directory=tmp_path, references=False, **SIZES)
    stored = json.loads(next(tmp_path.rglob("fixed.json")).read_text())
    assert len(stored["result"]["evaluations"]["3"]["metrics"]["mse"]) == 20


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learners": {}}, TypeError, "mapping of names"),
        ({"learners": [Mean]}, TypeError, "mapping of names"),
        ({"learners": {"a": "MAML"}}, TypeError, r"learners\['a'\] must be a factory"),
        ({"learners": {"a": lambda spec: 3}}, TypeError, "must give a Learner for a spec; got int"),
        ({"learners": {1: Mean}}, TypeError, "must be printable text of one line; got 1"),
        ({"learners": {"a\nb": Mean}}, TypeError, r"must be printable text of one line; got 'a\\nb'"),
        ({"tasks": {"": Levels()}}, TypeError, "must be printable text of one line; got ''"),
        ({"tasks": 3}, TypeError, "TaskDistribution; got int"),
        ({"tasks": {"a": Levels}}, TypeError, r"tasks\['a'\] must be .* got the class itself: Levels\(\) makes one"),
        ({"shots": 5}, TypeError, "shots must be a sequence of numbers of support rows; got 5"),
        ({"tasks": {}}, ValueError, "at least one task distribution"),
        ({"seeds": 0}, ValueError, "seeds must be an int >= 1"),
        ({"seeds": []}, ValueError, "at least one number"),
        ({"seeds": [1, 1]}, ValueError, "each once"),
        ({"n_episodes": 0}, ValueError, "n_episodes"),
        ({"shots": (0,)}, ValueError, "shots must be an int >= 1; got 0"),
        ({"split": "dev"}, ValueError, "split"),
        ({"train": None, "n_shot": 1, "n_query": 1}, ValueError, "a is to be trained on 'Levels'; give a budget"),
        ({"train": {"Level": CONFIG}}, ValueError, "did you mean 'Levels'"),
        ({"train": {("Levels", "A"): CONFIG}}, ValueError, "train: learner must be one of"),
        ({"train": {"Levels": 3}}, TypeError, "must be a TrainConfig; got int"),
        ({"train": 3}, TypeError, "train must be a TrainConfig"),
        ({"baseline": "b"}, ValueError, "baseline must be one of"),
        ({"device": "gpu"}, ValueError, "device must be one of"),
        ({"train": {"Levels": CONFIG, ("Levels", "a"): TrainConfig(steps=1)}}, ValueError, "n_shot must be given"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    trainer = Trainer()
    arguments = {"learners": {"a": Scaled}, "tasks": Levels(), "trainer": trainer, **SIZES, **change}
    with pytest.raises(error, match=message):
        compare(**arguments)
    assert trainer.calls == []


def test_meta_train_is_the_default():
    assert compare.__kwdefaults__["trainer"] is meta_train


class Prepared(Random):
    """Needs to be prepared, and nothing else."""

    def prepare(self, tasks, *, seed):
        with torch.no_grad():
            self.weight.copy_(torch.rand(()) + 10 * seed)


def test_learners_without_training_are_prepared_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    report = compare({"a": Prepared}, Levels(0.0), references=False, **SIZES)
    errors = report.values("Levels", "a").mean(1)
    assert errors[1] > 50 * errors[0] > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_net_from_outside_is_not_handed_from_run_to_run() -> None:
    net = torch.nn.Linear(4, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tasks, budget = GaussianClasses(n_way=3, dim=4), TrainConfig(steps=3, n_shot=1, n_query=1, validate_every=None)
    options = {"train": budget, "n_episodes": 4, "references": False, "progress": False}
    pair = compare(
        {"A": partial(ProtoNet, encoder=net), "B": partial(ProtoNet, encoder=net)}, tasks, seeds=2, **options
    )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    name = next(iter(pair.tasks))
    assert np.array_equal(pair.values(name, "A"), pair.values(name, "B"))
    alone = compare({"B": partial(ProtoNet, encoder=net)}, tasks, seeds=[1], **options)
    assert np.array_equal(pair.values(name, "B")[1:], alone.values(name, "B"))
