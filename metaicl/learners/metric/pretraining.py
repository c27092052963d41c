"""Encoders trained to tell all meta-training classes apart, and the learners that put a new head on them."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaicl.episode import Episode
from metaicl.functional import masked_mean, unit_rows
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.objectives import query_loss, stream_of
from metaicl.row_ids import look_up
from metaicl.spec import TaskSpec
from metaicl.task import TaskDistribution, derive_generator, single_precision

State = TypeVar("State")

_DRAWN = 64  # tasks, at first, in which classes are looked for where no split of them is declared


class ClassScores(nn.Module):
    """Scores of G classes from features (..., D): linear with a bias, or cosines times a fixed factor.

    Args:
        n_classes: G.
        dim: D.
        temperature: None for linear scores, else the factor on the cosines.
    """

    def __init__(self, n_classes: int, dim: int, *, temperature: float | None = None) -> None:
        """Start from zeros; `draw` gives random weights."""
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.zeros(n_classes, dim))
        self.bias = nn.Parameter(torch.zeros(n_classes)) if temperature is None else None

    def draw(self, generator: torch.Generator) -> "ClassScores":
        """Itself, with weights of a random direction for each class and about unit length."""
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) / self.weight.shape[1] ** 0.5)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """Scores (..., G)."""
        if self.temperature is None:
            return F.linear(features, self.weight, self.bias)
        return self.temperature * unit_rows(features) @ unit_rows(self.weight).mT


class PretrainedLearner(EmbeddingLearner[State]):
    """A learner whose encoder is trained by ordinary classification over all meta-training classes.

    `prepare` notes which source row is of which meta-training class. A meta-training update then classifies every row
    of its episodes, support and query alike, among all of these classes: as many rows and updates as any other
    learner in a comparison has. Task labels are not used.

    Classes of other splits have no output. Where rows have no named source (classes that are made afresh for every
    task), there is nothing to classify; then the query loss after adaptation is minimized, through the adaptation.

    Args:
        spec: A classification spec.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec.
        class_temperature: None for a linear classifier of meta-training classes, else the factor on cosines.

    Raises:
        ValueError: If the spec is a regression spec; RidgeHead serves those.
    """

    traits = CLASSIFIER

    row_classes: Tensor
    made_by_prepare = ("classifier",)  # see metaicl.checkpoint.load_weights: its size is the source's

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None, class_temperature: float | None = None) -> None:
        """Build the encoder where none is given; the classifier waits for `prepare`."""
        super().__init__(spec, encoder)
        self.class_temperature = class_temperature
        self.classifier: ClassScores | None = None
        # Only training needs it, and `prepare` fills it again.
        self.register_buffer("row_classes", torch.empty(0, dtype=torch.long), persistent=False)

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Number the meta-training classes; their classifier is drawn at the address (seed, "classifier").

        They are `tasks.class_splits["train"]`. Where the tasks do not declare that, they are the classes met in tasks
        of split "train", drawn at the address (seed, "classes") until as many again bring no other.
        """
        self.classifier = None
        device = self.row_classes.device
        self.row_classes = torch.empty(0, dtype=torch.long, device=device)
        if tasks.source_classes is None:
            return
        train = _training_classes(tasks, tasks.source_classes.cpu(), seed)
        if not len(train):
            return
        number = torch.full((int(tasks.source_classes.max()) + 1,), -1)
        number[train] = torch.arange(len(train))
        self.row_classes = number[tasks.source_classes.cpu()].to(device)
        self.classifier = self._new_classifier(len(train)).draw(derive_generator(seed, "classifier"))
        self.classifier.to(self._parameter())

    def meta_gradients(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean training loss and its gradient; see the class."""
        parameters = {name: value for name, value in self.named_parameters() if value.requires_grad}
        with torch.enable_grad():
            loss = self.training_losses(episode).mean()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        return loss.detach(), dict(zip(parameters, found, strict=True))

    def training_losses(self, episode: Episode) -> Tensor:
        """Cross-entropy over meta-training classes, mean over the rows of each task, in nats: (B,)."""
        if self.classifier is None or episode.support.ids is None or episode.query.ids is None:
            return query_loss(self, episode)
        rows = stream_of(episode)
        classes = look_up(self.row_classes, rows)  # -1 for what is of no meta-training class
        scores = self.classifier(self.embed(rows.x))
        losses = F.cross_entropy(scores.flatten(0, 1), classes.clamp(min=0).flatten(), reduction="none")
        return masked_mean(losses.view_as(classes), classes >= 0, 1)

    def _new_classifier(self, n_classes: int) -> ClassScores:
        return ClassScores(n_classes, self.feature_dim, temperature=self.class_temperature)

    def _parameter(self) -> Tensor:
        """A tensor with the device and the dtype of the encoder."""
        return next((p for p in self.encoder.parameters() if p.is_floating_point()), torch.empty(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "classifier.weight")  # its size is the source's, not the architecture's
        if saved is None:
            self.classifier = None
        elif self.classifier is None or self.classifier.weight.shape != saved.shape:
            self.classifier = self._new_classifier(saved.shape[0]).to(self._parameter())
        super()._load_from_state_dict(state_dict, prefix, *args)


def _training_classes(tasks: TaskDistribution, source_classes: Tensor, seed: int) -> Tensor:
    """The source classes of split "train", long (any,): as they are declared, or as tasks show them."""
    declared = getattr(tasks, "class_splits", None)
    if declared is not None:
        return torch.as_tensor(declared["train"])
    generator, found, n_tasks = derive_generator(seed, "classes"), source_classes.new_empty(0), _DRAWN
    while True:
        with single_precision():
            drawn = tasks.sample(n_tasks, split="train", n_shot=1, n_query=1, generator=generator)
        entries = [look_up(source_classes, rows).flatten() for rows in (drawn.support, drawn.query)]
        known = torch.cat([found, *entries]).unique()
        known = known[known >= 0]
        if len(known) == len(found):
            return found
        n_tasks, found = 2 * n_tasks if len(found) else n_tasks, known
