"""Example tasks for the page: small, JSON-ready pictures of episodes, and what each learner says about them.

A card has a `kind`: "curve" (regression with one input and one output), "plane" (classification of points in two
dimensions), "images" or "texts". Other tasks have no picture.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaicl.episode import Episode, Examples
from metaicl.learner import Learner
from metaicl.prefixes import first_shots
from metaicl.task import EVAL_SEED, EpisodeStream, Split, TaskDistribution, derive_seed
from metaicl.training import device_of, isolated_randomness, place, training_mode

N_EXAMPLES = 3
_GRID = 101  # inputs at which a curve is drawn
_PER_CLASS = 5  # support rows shown per class
_CLASSES = 5
_SIDE = 64  # pixels; larger images are thinned


def example_episode(
    tasks: TaskDistribution, *, shots: Sequence[int], n_shot: int, n_query: int, split: Split, seed: int
) -> Episode:
    """The first tasks of the evaluation stream, cut to `n_shot`."""
    stream = EpisodeStream(tasks, seed=seed, split=split, n_shot=max(shots), n_query=n_query)
    episode = next(stream.batches(0, N_EXAMPLES, batch_size=N_EXAMPLES))
    return Episode(first_shots(episode.support, n_shot, tasks.spec), episode.query)


def example_cards(tasks: TaskDistribution, episode: Episode) -> list[dict[str, Any]]:
    """A JSON-ready card for each task of `episode`; empty where there is no way to draw them."""
    spec = tasks.spec
    if spec.kind == "regression" and spec.x_shape == (1,) and spec.y_dim == 1:
        return [_curve(task) for task in episode]
    if spec.kind != "classification":
        return []
    if spec.x_kind == "vector" and spec.x_shape == (2,):
        return [_plane(task) for task in episode]
    if spec.x_kind == "image" and spec.x_shape[0] in (1, 3):
        return [{"kind": "images", "classes": _classes(task, _pixels, spec.output_size)} for task in episode]
    describe = getattr(tasks, "describe", None)
    if callable(describe) and episode.support.ids is not None and episode.query.ids is not None:

        def texts(part: Examples, rows: Tensor) -> Any:
            assert part.ids is not None
            return describe(part.ids[0, rows])

        return [{"kind": "texts", "classes": _classes(task, texts, spec.output_size)} for task in episode]
    return []


def sketches(learner: Learner, episode: Episode, cards: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The learner's predictions for the example tasks, one sketch for each card.

    A curve gets `mean` and `scale` at its grid, the latter NaN where a distribution has no variance; a classification
    task gets `right`, how many of its `rows` queries the learner labels rightly.

    Args:
        learner: Any learner; asked in eval mode, and left in the mode it was in.
        episode: The tasks of the cards.
        cards: From `example_cards`.
    """
    if not cards:
        return ()
    draws = isolated_randomness(derive_seed(EVAL_SEED, "sketches"), device_of(learner))
    with torch.no_grad(), training_mode(learner, False), draws:
        episode = place(episode, learner)
        if cards[0]["kind"] != "curve":
            answer: Any = learner(episode.support, episode.query.x)
            hits = (answer.probs.argmax(-1) == episode.query.y) & episode.query.real
            counts = zip(hits.sum(1).tolist(), episode.query.real.sum(1).tolist(), strict=True)
            return tuple({"right": right, "rows": rows} for right, rows in counts)
        grid = torch.tensor(
            [card["grid"] for card in cards], dtype=episode.query.x.dtype, device=episode.query.x.device
        )
        answer = learner(episode.support, grid[..., None])
        mean, scale = answer.mean[..., 0].tolist(), _scale(answer)[..., 0].tolist()
    return tuple({"mean": m, "scale": s} for m, s in zip(mean, scale, strict=True))


def _scale(answer: Any) -> Tensor:
    try:
        return answer.variance.clamp(min=0).sqrt()
    except NotImplementedError:
        return torch.full_like(answer.mean, math.nan)


def _curve(task: Episode) -> dict[str, Any]:
    points = {name: _points(part) for name, part in (("support", task.support), ("query", task.query))}
    x = [row[0] for rows in points.values() for row in rows]
    margin = 0.05 * (max(x) - min(x)) or 1.0
    grid = torch.linspace(min(x) - margin, max(x) + margin, _GRID, dtype=torch.float64).tolist()
    return {"kind": "curve", **points, "grid": grid}


def _plane(task: Episode) -> dict[str, Any]:
    return {"kind": "plane", "support": _points(task.support), "query": _points(task.query)}


def _points(part: Examples) -> list[list[float]]:
    """Real rows of one task as [*x, *y]."""
    real = part.real[0]
    y = part.y[0, real].reshape(int(real.sum()), -1).double()
    return torch.cat([part.x[0, real].double(), y], 1).tolist()


def _classes(task: Episode, show: Any, n_way: int) -> list[dict[str, Any]]:
    """For the first classes: some support rows and one query row, each shown by `show(part, rows)`."""
    found = []
    for label in range(min(n_way, _CLASSES)):
        shown = {}
        for name, part, limit in (("support", task.support, _PER_CLASS), ("query", task.query, 1)):
            rows = ((part.y[0] == label) & part.real[0]).nonzero()[:limit, 0]
            shown[name] = show(part, rows) if len(rows) else []
        found.append({"label": label, **shown})
    return found


def _pixels(part: Examples, rows: Tensor) -> list[dict[str, Any]]:
    """Images as bytes in base64, height x width x channels."""
    images = part.x[0, rows]
    step = -(-max(images.shape[-2:]) // _SIDE)
    images = (images[..., ::step, ::step].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    shape = list(images.shape[1:])
    return [
        {"shape": shape, "pixels": base64.b64encode(image.contiguous().numpy().tobytes()).decode()} for image in images
    ]
