"""A training step of a prototypical network as users of learn2learn and of easyfsl write it: one task after the other.

Each factory takes an encoder (it is copied) and returns (scores, update): `scores` gives the logits of one task's
queries, `update` does a step of Adam on an episode, the gradients of its tasks added up.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.episode import Episode
from metaicl.interop.learn2learn import import_learn2learn

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]
Steps = tuple[Scores, Callable[[Episode], None]]


def usual_conv4(norm: Callable[[int], nn.Module], *, channels: int = 64) -> nn.Sequential:
    """Conv4 as it is usually written: norm, ReLU and then pooling, in torch's usual layout."""
    blocks: list[nn.Module] = []
    for n_in in (1, channels, channels, channels):
        conv = nn.Conv2d(n_in, channels, 3, padding=1)
        blocks += [conv, norm(channels), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
    return nn.Sequential(*blocks, nn.Flatten())


def learn2learn_steps(encoder: nn.Module) -> Steps:
    """Support and query through the encoder together, then its classifier of prototypes: squared distances."""
    own = copy.deepcopy(encoder)
    classifier = import_learn2learn().nn.PrototypicalClassifier()

    def scores(x: Tensor, y: Tensor, new_x: Tensor) -> Tensor:
        features = own(torch.cat([x, new_x]))
        classifier.fit_(features[: len(x)], y)
        return classifier(features[len(x) :])

    return scores, _loop(own, scores)


def easyfsl_steps(encoder: nn.Module) -> Steps:
    """First the support, class by class, then the query; scores are negative distances, not squared ones."""
    own = copy.deepcopy(encoder)

    def scores(x: Tensor, y: Tensor, new_x: Tensor) -> Tensor:
        features = own(x)
        n_way = len(torch.unique(y))
        prototypes = torch.cat([features[torch.nonzero(y == label)].mean(0) for label in range(n_way)])
        return -torch.cdist(own(new_x), prototypes)

    return scores, _loop(own, scores)


def _loop(net: nn.Module, scores: Scores) -> Callable[[Episode], None]:
    adam = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)

    def update(episode: Episode) -> None:
        adam.zero_grad()
        support, query = episode.support, episode.query
        for x, y, new_x, new_y in zip(support.x, support.y, query.x, query.y, strict=True):
            (F.cross_entropy(scores(x, y, new_x), new_y) / episode.n_tasks).backward()
        adam.step()

    return update
