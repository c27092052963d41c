"""The conditional neural process: the plainest black-box learner."""

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.episode import Examples
from metaicl.functional import masked_mean, prototypes
from metaicl.learner import Learner, Traits, check_support_labels
from metaicl.nets.backbones import MLP
from metaicl.nets.rows import AnswerHead, RowEmbedding
from metaicl.spec import TaskSpec


class ConditionalNeuralProcess(Learner[Tensor]):
    """Summarize the support by a mean over rows, then decode each query from that summary.

    Classification keeps one mean per class and decodes from all of them side by side.

    Args:
        spec: The tasks.
        encoder: (rows, *x_shape) -> (rows, any); None takes vectors as they are and builds one for other inputs.
        dim: D, width of all layers.

    Reference:
        Garnelo et al. 2018, arXiv:1807.01613, equations 2 to 4 and section 4.3 (one summary per class).
    """

    traits = Traits()

    def __init__(self, spec: TaskSpec, *, encoder: nn.Module | None = None, dim: int = 128) -> None:
        """Build row encoder, decoder and head."""
        super().__init__(spec)
        self.embed = RowEmbedding(spec, dim=dim, encoder=encoder)
        self.declare_nets(self.embed)
        self.summarize = nn.Sequential(nn.ReLU(), MLP((dim, dim, dim, dim)))
        n_summaries = spec.output_size if spec.kind == "classification" else 1
        self.decode = nn.Sequential(MLP(((n_summaries + 1) * dim, dim, dim, dim)), nn.ReLU())
        self.head = AnswerHead(spec, dim=dim)

    def adapt(self, support: Examples) -> Tensor:
        """The summary (B, D), or (B, C D) with one part per class."""
        check_support_labels(self.spec, support)
        codes = self.summarize(self.embed(support.x, support.y))
        if self.spec.kind == "classification":
            return prototypes(codes, support.y, self.spec.output_size, support.mask).flatten(1)
        return masked_mean(codes, support.mask, 1)

    def predict(self, state: Tensor, x: Tensor) -> Distribution:
        """Decode each query together with the summary."""
        queries = self.embed(x)
        summary = state[:, None].expand(-1, queries.shape[1], -1)
        return self.head(self.decode(torch.cat([queries, summary], -1)))
