"""A net that is fine-tuned as rows arrive, with or without replay."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl import TaskSpec
from metaicl.collation import concatenate
from metaicl.episode import Examples
from metaicl.functional import categorical
from metaicl.learner import Learner, Traits
from metaicl.nets.backbones import encoder_dim

State = tuple[nn.Module, Examples | None]  # a net of its own, and the rows it may replay


class FineTuned(Learner[State]):
    """A pretrained net that goes on training as rows arrive, on 64 rows an update; with replay half of them are old."""

    traits = Traits(kinds=("classification",), order_sensitive=True)

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module, steps: int, lr: float, replay: bool) -> None:
        """Add a head of zeros."""
        super().__init__(spec)
        head = nn.Linear(encoder_dim(encoder, spec), spec.output_size)
        for value in head.parameters():
            nn.init.zeros_(value)
        self.net = nn.Sequential(copy.deepcopy(encoder), head)
        self.steps, self.lr, self.replay = steps, lr, replay

    def adapt(self, support: Examples) -> State:
        """Start from the pretrained net."""
        return self.update((self.net, None), support)

    def update(self, state: State, examples: Examples) -> State:
        """Train a copy on the new rows of the one task, B = 1."""
        if not bool(examples.real.any()):
            return state
        net, old = copy.deepcopy(state[0]), state[1]
        optimizer = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=0.9)
        n_seen = int(examples.y.max()) + 1  # labels count up as classes arrive
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = _draw(examples, 64) if old is None else concatenate(_draw(examples, 32), _draw(old, 32))
                optimizer.zero_grad()
                F.cross_entropy(net(rows.x[0])[:, :n_seen], rows.y[0]).backward()
                optimizer.step()
        kept = examples if old is None else concatenate(old, examples)
        return net, kept if self.replay else None

    def predict(self, state: State, x: Tensor) -> Distribution:
        """The net's answer."""
        return categorical(state[0](x[0])[None])


def _draw(rows: Examples, n_rows: int) -> Examples:
    return rows.rows(torch.randint(rows.n_rows, (n_rows,)))
