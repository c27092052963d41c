"""The task mixture: cues name tasks and nothing else, splits are disjoint as declared, references are what they say."""

import pytest
import torch

from metaicl.episode import Episode
from metaicl.evaluation import evaluate
from metaicl.leakage import audit_leakage
from metaicl.task import SPLITS, EpisodeStream
from metaicl.tasks.mixture import TaskMixture
from metaicl.testing import check_tasks, parametrize_with_checks

FAMILIES = {"rows": TaskMixture(n_pool=20), "tasks": TaskMixture(n_pool=30, held_out="tasks")}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mixture_keeps_the_contract(name: str) -> None:
    check_tasks(FAMILIES[name])


@parametrize_with_checks(dict(FAMILIES["rows"].references()), {"rows": FAMILIES["rows"]})
def test_references_keep_the_contract(check) -> None:
    check()


def sample(tasks: TaskMixture, split="train", chunk: int = 200, n_shot: int = 3) -> Episode:
    return EpisodeStream(tasks, seed=0, split=split, n_shot=n_shot, n_query=3, chunk_size=chunk)[0]


def test_rows_are_what_the_latents_say() -> None:
    tasks = TaskMixture(n_pool=20, noise=1e-6)
    episode = sample(tasks)
    z = episode.query.x[..., tasks.cue_dim :]
    torch.testing.assert_close(
        episode.query.y[..., 0], (z * episode.latents["weights"][:, None]).sum(-1), atol=1e-4, rtol=0
    )
    assert torch.equal(tasks.weights[episode.latents["task_ids"][:, 0]], episode.latents["weights"])


def test_the_oracle_knows_the_task_of_every_row() -> None:
    tasks = TaskMixture(n_pool=100, cue_scale=2.0)  # cues far enough apart for their noise
    episode = sample(tasks, chunk=500)
    found = tasks.codes(episode.query.x).argmax(-1)
    assert float((found == episode.latents["task_ids"]).float().mean()) > 0.999


def test_cues_say_nothing_about_the_weights() -> None:
    tasks = TaskMixture(n_pool=4000, cue_dim=3, dim=1)
    cues, weights = tasks.cues.double(), tasks.weights.double()
    fitted = cues @ torch.linalg.lstsq(cues, weights).solution
    assert float(1 - (weights - fitted).square().mean() / weights.var()) < 0.005


@pytest.mark.parametrize("held_out", ["rows", "tasks"])
def test_splits_share_what_they_declare(held_out: str) -> None:
    tasks = FAMILIES[held_out]
    audit_leakage(tasks, n_episodes=100).raise_if_leaky()
    seen = {split: set(sample(tasks, split).latents["task_ids"].flatten().tolist()) for split in SPLITS}
    if held_out == "rows":
        assert seen["train"] == seen["test"] == set(range(20))
    else:
        assert not seen["train"] & seen["test"]
        assert not seen["train"] & seen["validation"]


@pytest.mark.parametrize("cue_noise", [0.1, 0.5])
def test_the_known_pool_is_the_posterior_predictive(cue_noise: float) -> None:
    tasks = TaskMixture(n_pool=7, cue_dim=2, cue_noise=cue_noise, noise=0.7)
    episode = sample(tasks, chunk=4, n_shot=2)
    found = tasks.references()["pool known"](episode.support, episode.query.x)
    dim, cues, weights = tasks.cue_dim, tasks.cues.double(), tasks.weights.double()

    def likelihood(row: torch.Tensor, task: int) -> torch.Tensor:
        return torch.distributions.Normal(cues[task], cue_noise).log_prob(row[:dim].double()).sum().exp()

    for b in range(4):
        evidence = torch.ones(7, dtype=torch.float64)
        for x, y in zip(episode.support.x[b], episode.support.y[b, :, 0].double(), strict=True):
            targets = torch.distributions.Normal(weights @ x[dim:].double(), 0.7).log_prob(y).exp()
            evidence *= torch.stack([likelihood(x, task) for task in range(7)]) * targets
        for q, (x, y) in enumerate(zip(episode.query.x[b], episode.query.y[b, :, 0].double(), strict=True)):
            share = evidence * torch.stack([likelihood(x, task) for task in range(7)])
            share /= share.sum()
            means = weights @ x[dim:].double()
            density = (share * torch.distributions.Normal(means, 0.7).log_prob(y).exp()).sum()
            assert float(found.mean[b, q, 0]) == pytest.approx(float(share @ means), abs=1e-5)
            assert float(found.log_prob(episode.query.y)[b, q]) == pytest.approx(float(density.log()), abs=1e-5)


def test_nobody_beats_who_knows_the_pool() -> None:
    for tasks in (TaskMixture(), TaskMixture(cue_noise=0.2)):
        found = {
            name: evaluate(one, tasks, n_shot=5, n_query=5, n_episodes=200) for name, one in tasks.references().items()
        }
        assert found["pool known"].mean("nll") < found["support alone"].mean("nll")
        assert found["pool known"].mean("mse") == pytest.approx(tasks.noise**2, rel=0.15)


def test_what_the_references_reach() -> None:
    tasks = TaskMixture(n_pool=1000, cue_scale=2.0)
    found = {
        name: evaluate(one, tasks, n_shot=1, n_query=5, n_episodes=400) for name, one in tasks.references().items()
    }
    assert found["pool known"].mean("mse") == pytest.approx(tasks.noise**2, rel=0.1)
    # One row leaves one of the two weights unknown, whose prior variance is one.
    assert 0.7 < found["support alone"].mean("mse") < 1.3


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="held_out must be one of"):
        TaskMixture(held_out="task")
    with pytest.raises(ValueError, match="n_pool must be an int >= 3; got 2"):
        TaskMixture(n_pool=2)
