"""Against the installed learn2learn package: a quiet import, its algorithms, task sets both ways."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.random import mtrand
from torch import nn

from metaicl.checks import check_episode
from metaicl.interop import l2l_package
from metaicl.interop.learn2learn import (
    L2LGBML,
    L2LMAML,
    L2LMetaSGD,
    TasksetDistribution,
    import_learn2learn,
    to_taskset,
)
from metaicl.leakage import audit_leakage
from metaicl.learners.gradient.maml import MAML
from metaicl.objectives import query_loss, squared_error
from metaicl.spec import TaskSpec
from metaicl.task import SPLITS, EpisodeStream, derive_generator, episodes
from metaicl.tasks.functions import Sinusoid
from metaicl.tasks.gaussians import GaussianClasses
from metaicl.testing import check_tasks

SINUSOID = Sinusoid()
VECTORS = TaskSpec("classification", (3,), n_way=2)
ALGORITHMS = (L2LMAML, L2LMetaSGD, L2LGBML)


@pytest.fixture(autouse=True)
def _same_nets():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def waves(n_tasks=3):
    episode = SINUSOID.sample(n_tasks, split="train", n_shot=5, n_query=4, generator=derive_generator("l2l"))
    return episode.to(dtype=torch.float64)


def rows_of(n_classes, first=0, per_class=7):
    """Row r of class c is (c, r, 0): every row tells where it came from."""
    c = torch.arange(n_classes).repeat_interleave(per_class)
    r = torch.arange(per_class).repeat(n_classes)
    x = torch.stack([c + first, r, torch.zeros_like(r)], 1).float()
    return torch.utils.data.TensorDataset(x, c)


def taskset(n_classes=5, *, first=0, k=6, num_tasks=-1, remap=True, dataset=None, shuffle=True):
    l2l = import_learn2learn()
    data = l2l.data.MetaDataset(rows_of(n_classes, first)) if dataset is None else dataset
    transforms = [
        l2l.data.transforms.NWays(data, n=2),
        l2l.data.transforms.KShots(data, k=k),
        l2l.data.transforms.LoadData(data),
    ]
    if remap:
        transforms.append(l2l.data.transforms.RemapLabels(data, shuffle=shuffle))
    return l2l.data.Taskset(data, transforms, num_tasks=num_tasks)


def three_splits(**settings):
    tasksets = {
        "train": taskset(6, **settings),
        "validation": taskset(4, first=6, **settings),
        "test": taskset(5, first=10, **settings),
    }
    return TasksetDistribution(tasksets, VECTORS)


def test_import_is_silent_with_warnings_as_errors():
    code = "from metaicl.interop.learn2learn import import_learn2learn as f; print(f().__version__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("0.2.0", "", 0)


def test_a_missing_package_is_named_with_its_commands(monkeypatch):
    monkeypatch.delitem(sys.modules, "learn2learn", raising=False)

    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(l2l_package.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"pip install --no-build-isolation .*learn2learn==0\.2\.0"):
        import_learn2learn()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learner", ALGORITHMS)
def test_algorithms_start_as_our_maml(learner, first_order):
    """Meta-SGD starts with equal step sizes and Kronecker transforms as the identity: all are MAML at first."""
    net = MAML(SINUSOID.spec).net
    settings = {"net": net, "inner_lr": 0.05, "inner_steps": 3, "first_order": first_order}
    ours, theirs = MAML(SINUSOID.spec, **settings).double(), learner(SINUSOID.spec, **settings).double()
    expected, found = (
        torch.autograd.grad(squared_error(each, waves()).sum(), list(net.parameters())) for each in (ours, theirs)
    )
    assert max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) < 1e-12
    with torch.no_grad():
        silent = theirs(waves().support, waves().query.x)
        assert torch.equal(silent.mean, theirs.requires_grad_(False)(waves().support, waves().query.x).mean)
    assert float((silent.mean - ours(waves().support, waves().query.x).mean).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("learner", ALGORITHMS)
def test_everything_is_trained_and_nothing_is_changed(learner):
    made = learner(SINUSOID.spec, inner_steps=2).double()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    query_loss(made, waves()).sum().backward()
    missing = [name for name, value in made.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert missing == []
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    copy = learner(SINUSOID.spec, inner_steps=2).double()
    copy.load_state_dict(made.state_dict())
    assert torch.equal(query_loss(copy, waves()), query_loss(made, waves()))


def test_meta_sgd_learns_its_step_sizes_by_hand():
    made = L2LMetaSGD(SINUSOID.spec, net=nn.Linear(1, 1), inner_lr=0.125).double()
    gradients = torch.autograd.grad(squared_error(made, waves()).sum(), list(made.algorithm.lrs))
    expected = [torch.zeros_like(lr) for lr in made.algorithm.lrs]
    for task in waves():
        weights = [p.detach().clone().requires_grad_() for p in made.net.parameters()]
        inner = torch.autograd.grad(
            (task.support.x[0] @ weights[0].T + weights[1] - task.support.y[0]).square().mean(), weights
        )
        fast = [w - 0.125 * g for w, g in zip(weights, inner, strict=True)]
        outer = torch.autograd.grad((task.query.x[0] @ fast[0].T + fast[1] - task.query.y[0]).square().mean(), weights)
        expected = [e - g * o for e, g, o in zip(expected, inner, outer, strict=True)]
    assert max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True)) < 1e-12


def test_gbml_takes_any_transform_and_adapts_it():
    l2l = import_learn2learn()
    scaled = L2LGBML(SINUSOID.spec, transform=l2l.optim.ModuleTransform(nn.Linear), inner_lr=0.01).double()
    assert query_loss(scaled, waves()).isfinite().all()
    curvature = L2LGBML(
        SINUSOID.spec, transform=l2l.optim.MetaCurvatureTransform, inner_steps=3, inner_lr=0.1, adapt_transform=True
    ).double()
    plain = L2LGBML(
        SINUSOID.spec, net=curvature.net, transform=l2l.optim.MetaCurvatureTransform, inner_steps=3, inner_lr=0.1
    ).double()
    with torch.no_grad():
        assert float((squared_error(curvature, waves()) - squared_error(plain, waves())).abs().max()) > 1e-6
    with pytest.raises(ValueError, match="adapt_transform and first_order"):
        L2LGBML(SINUSOID.spec, adapt_transform=True, first_order=True)


def test_masked_rows_are_absent():
    from metaicl.episode import Examples

    learner, episode = L2LMAML(SINUSOID.spec).double(), waves()
    mask = torch.arange(5) < 3
    support = Examples(episode.support.x, episode.support.y, mask.expand(3, 5))
    masked, removed = (
        learner(support, episode.query.x).mean,
        learner(episode.support.rows(slice(0, 3)), episode.query.x).mean,
    )
    assert torch.equal(masked, removed)
    empty = Examples(episode.support.x, episode.support.y, torch.zeros(3, 5, dtype=torch.bool))
    unadapted = learner.net(episode.query.x)
    assert float((learner(empty, episode.query.x).mean - unadapted).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("learner", ALGORITHMS)
def test_bad_settings(learner):
    with pytest.raises(ValueError, match="inner_lr must be"):
        learner(SINUSOID.spec, inner_lr=0)
    with pytest.raises(ValueError, match="inner_steps must be"):
        learner(SINUSOID.spec, inner_steps=0)
    with pytest.raises(ValueError, match="parameters to adapt; got Flatten"):
        learner(SINUSOID.spec, net=nn.Flatten())


# Their task sets as our distributions


def test_a_taskset_becomes_an_addressed_distribution():
    tasks = three_splits()
    first = list(episodes(tasks, seed=3, split="train", start=0, stop=4, n_shot=2, n_query=3))
    again = list(episodes(tasks, seed=3, split="train", start=2, stop=4, n_shot=2, n_query=3))
    other = next(episodes(tasks, seed=4, split="train", start=0, stop=1, n_shot=2, n_query=3))
    assert [e.fingerprint() for e in first[2:]] == [e.fingerprint() for e in again]
    assert other.fingerprint() != first[0].fingerprint()
    for episode in first:
        check_episode(episode, VECTORS)
        assert episode.support.x.shape == (1, 4, 3)
        assert episode.query.x.shape == (1, 6, 3)
        assert sorted(episode.support.y[0].tolist()) == [0, 0, 1, 1]


def test_rows_labels_and_latents_of_a_taskset_agree():
    tasks = three_splits()
    assert tasks.class_splits is not None
    assert {split: len(classes) for split, classes in tasks.class_splits.items()} == {
        "train": 6,
        "validation": 4,
        "test": 5,
    }
    data = tasks.tasksets["train"].dataset  # what two splits draw from, only their tasks tell apart
    shared = {"train": taskset(dataset=data), "test": taskset(dataset=data)}
    assert TasksetDistribution(shared, VECTORS).class_splits is None
    for split, offset in (("train", 0), ("validation", 6), ("test", 10)):
        episode = tasks.sample(5, split=split, n_shot=2, n_query=3, generator=derive_generator("agree", split))
        class_ids = episode.latents["class_ids"]
        for part in (episode.support, episode.query):
            assert torch.equal(part.x[..., 0].long(), class_ids.gather(1, part.y))  # column 0 names the class
            assert torch.equal(tasks.source_classes[part.ids], class_ids.gather(1, part.y))
            assert int(part.x[..., 0].min()) >= offset
        seen = torch.cat([episode.support.ids, episode.query.ids], 1)
        assert all(len(set(row.tolist())) == 10 for row in seen)  # support and query share no row


@pytest.mark.parametrize("remap", [True, False])
def test_labels_carry_no_information(remap):
    tasks = TasksetDistribution(taskset(2, remap=remap, shuffle=False), VECTORS)
    episode = tasks.sample(200, split="train", n_shot=1, n_query=1, generator=derive_generator("labels"))
    share = (episode.latents["class_ids"][:, 0] == 0).double().mean()
    assert 0.35 < float(share) < 0.65
    assert 0.35 < float((episode.support.y[:, 0] == 0).double().mean()) < 0.65


def test_global_generators_are_left_alone():
    states = random.getstate(), mtrand.get_state()[1].copy(), torch.get_rng_state()
    three_splits().sample(2, split="test", n_shot=1, n_query=1, generator=derive_generator("global"))
    assert random.getstate() == states[0]
    assert np.array_equal(mtrand.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_finite_taskset_keeps_its_tasks():
    finite = taskset(6, num_tasks=3)
    tasks = TasksetDistribution(finite, VECTORS)
    episode = tasks.sample(40, split="train", n_shot=3, n_query=3, generator=derive_generator("finite"))
    drawn = {tuple(sorted(set(ids.tolist()))) for ids in torch.cat([episode.support.ids, episode.query.ids], 1)}
    assert len(drawn) == len(finite.sampled_descriptions) == 3
    fresh = TasksetDistribution(taskset(6, num_tasks=3), VECTORS)
    again = fresh.sample(40, split="train", n_shot=3, n_query=3, generator=derive_generator("finite"))
    assert again.fingerprint() == episode.fingerprint()


def test_workers_give_the_same_episodes():
    stream = EpisodeStream(three_splits(num_tasks=4), seed=1, split="train", n_shot=1, n_query=2, chunk_size=2)
    here = [e.fingerprint() for e in stream.batches(0, 6, batch_size=2)]
    fresh = EpisodeStream(three_splits(num_tasks=4), seed=1, split="train", n_shot=1, n_query=2, chunk_size=2)
    assert [e.fingerprint() for e in fresh.batches(0, 6, batch_size=2, workers=1)] == here


def test_a_duck_with_sample_will_do_and_so_does_regression():
    class Duck:
        def sample(self):
            x = torch.rand(6, 1)
            return x, 2 * x[:, 0] + random.random()

    tasks = TasksetDistribution({"test": Duck()}, SINUSOID.spec)
    episode = tasks.sample(3, split="test", n_shot=2, n_query=4, generator=derive_generator("duck"))
    check_episode(episode, SINUSOID.spec)
    again = tasks.sample(3, split="test", n_shot=2, n_query=4, generator=derive_generator("duck"))
    assert again.fingerprint() == episode.fingerprint()
    assert len(set(episode.query.x.flatten().tolist())) == 12


def test_tasks_without_named_classes_sit_the_exam_too():
    """Regression, and objects that only have `sample`: there is no identity of theirs to look for in two splits."""

    class Lines:
        def sample(self):
            x = torch.rand(8, 1)
            return x, torch.randn(()) * x

    class Labels:
        def sample(self):
            y = torch.arange(2).repeat(5)
            return torch.rand(10, 3) + y[:, None], y

    for duck, spec in ((Lines, TaskSpec("regression", (1,), y_dim=1)), (Labels, VECTORS)):
        tasks = TasksetDistribution({split: duck() for split in SPLITS}, spec)
        check_tasks(tasks, checks=["spec", "rows_disjoint", "splits_disjoint"])
        assert not audit_leakage(tasks, n_episodes=5).leaky


def test_splits_of_one_data_set_share_rows_and_no_classes():
    l2l = import_learn2learn()
    base = l2l.data.MetaDataset(rows_of(9))

    def only(*labels, below=base):
        return taskset(dataset=l2l.data.FilteredMetaDataset(below, labels))

    tasks = TasksetDistribution({"train": only(5, 6, 7, 8), "validation": only(0, 1), "test": only(2, 3)}, VECTORS)
    assert tasks.class_splits is not None
    assert {split: ids.tolist() for split, ids in tasks.class_splits.items()} == {
        "train": [0, 1, 2, 3],
        "validation": [4, 5],
        "test": [6, 7],
    }
    assert tasks.source_classes.tolist() == [c for c in range(8) for _ in range(7)]
    assert not audit_leakage(tasks, n_episodes=25).leaky
    with pytest.raises(ValueError, match=r"'train' and 'test' share 1, for instance 6\. Filter other labels"):
        TasksetDistribution({"train": only(5, 6, 7), "test": only(6, 2)}, VECTORS)
    union = l2l.data.UnionMetaDataset([only(7, 8).dataset, only(0, 1).dataset])
    with pytest.raises(ValueError, match="share 2, for instance 7"):
        TasksetDistribution({"train": taskset(dataset=union), "test": only(7, 8)}, VECTORS)
    assert TasksetDistribution({"train": taskset(dataset=union), "test": only(5, 6)}, VECTORS).class_splits is not None
    halves = [torch.utils.data.Subset(rows_of(4, per_class=14), list(range(first, 56, 2))) for first in (0, 1)]
    halves[1].dataset = halves[0].dataset
    first, second = (taskset(dataset=l2l.data.MetaDataset(half)) for half in halves)
    with pytest.raises(ValueError, match="share 4"):
        TasksetDistribution({"train": first, "test": second}, VECTORS)
    again = l2l.data.MetaDataset(base.dataset)  # two whole data sets: transforms may tell the splits apart
    whole = {"train": taskset(dataset=base), "validation": taskset(dataset=base), "test": taskset(dataset=again)}
    shared = TasksetDistribution(whole, VECTORS)
    assert shared.class_splits is None
    assert audit_leakage(shared, n_episodes=25).counts["classes in two splits"] > 0


def test_taskset_errors():
    shared = taskset()
    with pytest.raises(ValueError, match="share one task set"):
        TasksetDistribution({"train": shared, "test": shared}, VECTORS)
    with pytest.raises(ValueError, match="keyed by"):
        TasksetDistribution({"meta-train": shared}, VECTORS)
    with pytest.raises(TypeError, match=r"with sample\(\); got list"):
        TasksetDistribution({"train": [1, 2]}, VECTORS)
    tasks = TasksetDistribution(shared, VECTORS)
    generator = derive_generator("errors")
    with pytest.raises(ValueError, match=r"no task set for split 'test'.*\['train'\]"):
        tasks.sample(1, split="test", n_shot=1, n_query=1, generator=generator)
    with pytest.raises(ValueError, match=r"n_shot \+ n_query = 7 rows .* gives 6"):
        tasks.sample(1, split="train", n_shot=3, n_query=4, generator=generator)
    with pytest.raises(ValueError, match="n_way = 3; the task set gave a task of 2"):
        TasksetDistribution(shared, VECTORS.with_n_way(3)).sample(
            1, split="train", n_shot=1, n_query=1, generator=generator
        )
    other = TasksetDistribution(shared, TaskSpec("classification", (4,), n_way=2))
    with pytest.raises(ValueError, match=r"rows of shape \(4,\); the task set gave \(3,\)"):
        other.sample(1, split="train", n_shot=1, n_query=1, generator=generator)


# Our distributions as their task sets


def test_our_tasks_slice_as_in_learn2learns_examples():
    tasks = GaussianClasses(n_way=3, dim=4)
    X, y = to_taskset(tasks, split="train", n_shot=2, n_query=2, seed=7).sample()
    episode = EpisodeStream(tasks, seed=7, split="train", n_shot=2, n_query=2, chunk_size=1)[0]
    adaptation = np.zeros(len(X), dtype=bool)
    adaptation[np.arange(2 * 3) * 2] = True  # the lines of learn2learn's maml_miniimagenet.py
    for rows, part in ((adaptation, episode.support), (~adaptation, episode.query)):
        order = part.y[0].argsort(stable=True)
        assert torch.equal(X[torch.from_numpy(rows)], part.x[0][order])
        assert torch.equal(y[torch.from_numpy(rows)], part.y[0][order])


def test_our_tasks_partition_as_in_learn2learn():
    partition = import_learn2learn().data.partition_task
    tasks = GaussianClasses(n_way=3, dim=4)
    X, y = to_taskset(tasks, split="test", n_shot=1, n_query=4, seed=7).sample()
    episode = EpisodeStream(tasks, seed=7, split="test", n_shot=1, n_query=4, chunk_size=1)[0]
    for (x_part, y_part), part in zip(partition(X, y, shots=1), (episode.support, episode.query), strict=True):
        order = part.y[0].argsort(stable=True)
        assert torch.equal(x_part, part.x[0][order])
        assert torch.equal(y_part, part.y[0][order])


def test_task_set_interface():
    tasks = GaussianClasses(n_way=2, dim=2)
    finite = to_taskset(tasks, split="train", n_shot=1, n_query=1, seed=0, num_tasks=3)
    assert len(finite) == len(list(finite)) == len(list(finite)) == 3
    everything = [finite[i][0] for i in range(3)]
    drawn = [finite.sample()[0] for _ in range(20)]
    assert {next(i for i, x in enumerate(everything) if torch.equal(x, d)) for d in drawn} == {0, 1, 2}
    with pytest.raises(IndexError, match=r"\[0, 3\); got 3"):
        finite[3]
    endless = to_taskset(tasks, split="train", n_shot=1, n_query=1, seed=0)
    assert len(endless) == 1
    assert torch.equal(endless.sample()[0], everything[0])
    assert torch.equal(endless[0][0], everything[1])
    assert torch.equal(next(iter(endless))[0], everything[2])
    with pytest.raises(ValueError, match="num_tasks must be an int >= 1; got 0"):
        to_taskset(tasks, split="train", n_shot=1, n_query=1, seed=0, num_tasks=0)


def test_regression_tasks_and_the_way_back():
    there = to_taskset(SINUSOID, split="train", n_shot=3, n_query=4, seed=1)
    X, y = there.sample()
    assert (X.shape, y.shape) == ((7, 1), (7, 1))
    episode = EpisodeStream(SINUSOID, seed=1, split="train", n_shot=3, n_query=4, chunk_size=1)[0]
    assert torch.equal(X[:3], episode.support.x[0])
    back = TasksetDistribution({"train": there}, SINUSOID.spec)
    episode = back.sample(2, split="train", n_shot=3, n_query=4, generator=derive_generator("back"))
    assert len(set(episode.support.x.flatten().tolist()) | set(episode.query.x.flatten().tolist())) == 14


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_frozen_parameters_do_not_adapt(algorithm):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].requires_grad_(False)
    learner = algorithm(VECTORS, net=net, inner_lr=0.1, inner_steps=2).double()
    stream = EpisodeStream(GaussianClasses(n_way=2, dim=3), seed=0, split="train", n_shot=2, n_query=2, chunk_size=2)
    episode = stream[0].to(dtype=torch.float64)
    expected = query_loss(MAML(VECTORS, net=net, inner_lr=0.1, inner_steps=2), episode)
    assert torch.allclose(query_loss(learner, episode), expected, rtol=0, atol=1e-12)
    assert set(learner.adapt(episode.support)) == {"2.weight", "2.bias"}
    trained = {name for name, value in learner.named_parameters() if value.requires_grad}
    assert not any(name.endswith(("module.0.weight", "lrs.0")) for name in trained)
