"""Prototypical networks, in episodes and in streams."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_labels
from metaicl.episode import Examples
from metaicl.functional import categorical, without_absent
from metaicl.learners.metric.embedding import CLASSIFIER, EmbeddingLearner
from metaicl.nets.exact_sums import ClassSums, add_class_sums, class_sums
from metaicl.nets.similarity import Distance, Similarity
from metaicl.spec import TaskSpec


class ProtoNet(EmbeddingLearner[ClassSums]):
    """Classify by the distance to the class means of the embedded support.

    The state is the sum and the number of the embedded rows of each class, kept such that a state does not depend on
    the order in which rows came, nor on who saw them, to the last bit (see `class_sums`; given equal embeddings: an
    encoder may round a row differently in batches of different sizes). So it can be streamed: `update` adds rows, also
    of classes that were never seen before, and `merge` joins the states of clients. A class that no row has shown has a
    probability of about 1e-30, as long as others have rows: its mean is not known, and the origin would stand for it.

    Args:
        spec: A classification spec. `adapt` answers over its n_way classes; streams may go beyond.
        encoder: (rows, *x_shape) -> (rows, D); None builds one from the spec. `nn.Identity()` (for vectors) gives
            the nearest class mean.
        distance: "euclidean" (squared distances) or "cosine".
        temperature: Start of the learned factor on the scores; None takes 1 / sqrt(D) for distances and 10 for cosines
            (see `Similarity`). The paper has none (1.0, `learn_temperature=False`).
        learn_temperature: Train the factor; without it the scale of the encoder's output has to do.

    Raises:
        ValueError: If the spec is a regression spec (RidgeHead serves those) or the distance is unknown.

    Reference:
        Snell, Swersky & Zemel, 2017, arXiv:1703.05175, equations 1 and 2. Differs: group normalization in the encoder
        built here; the learned temperature (Oreshkin et al. 2018, arXiv:1805.10123, equation 2).
    """

    traits = CLASSIFIER

    def __init__(
        self,
        spec: TaskSpec,
        *,
        encoder: nn.Module | None = None,
        distance: Distance = "euclidean",
        temperature: float | None = None,
        learn_temperature: bool = True,
    ) -> None:
        """Build the encoder where none is given."""
        super().__init__(spec, encoder)
        self.similarity = Similarity(
            self.feature_dim, distance=distance, temperature=temperature, learn_temperature=learn_temperature
        )

    def adapt(self, support: Examples) -> ClassSums:
        """The sums of each class, C = n_way."""
        check_labels("support.y", support, self.spec.output_size)
        return self._sums(support, self.spec.output_size)

    def predict(self, state: ClassSums, x: Tensor) -> Distribution:
        """Softmax over the similarities to the prototypes, over all classes of the state that have rows."""
        queries = self.embed(x)
        scores = self.similarity(queries, state.means().to(queries.dtype))
        return categorical(without_absent(scores, state.counts > 0))

    def update(self, state: ClassSums, examples: Examples) -> ClassSums:
        """The state after these rows too; a label that no row had so far adds classes up to it."""
        check_labels("examples.y", examples, None)
        largest = int(examples.y.masked_fill(~examples.real, -1).max()) if examples.n_rows else -1
        n_classes = max(state.n_classes, largest + 1)
        return add_class_sums([state, self._sums(examples, n_classes)])

    def merge(self, states: Sequence[ClassSums]) -> ClassSums:
        """The state after the rows of all states; one that lacks the last classes counts as having no row of them.

        Reference:
            Hendryx et al. 2021, "Federated reconnaissance" (running prototypes that clients and server merge). Differs:
            sums are merged instead of means, so that nothing is rounded.
        """
        return add_class_sums(states)

    def _sums(self, rows: Examples, n_classes: int) -> ClassSums:
        y = rows.y if rows.mask is None else rows.y * rows.mask  # masked rows may hold any label
        return class_sums(self.embed(rows.x), y, n_classes, rows.mask)
