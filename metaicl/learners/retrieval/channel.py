"""The channel direction for texts: which label makes the words of the query likely?"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from metaicl.checks import check_labels, check_positive
from metaicl.episode import Examples
from metaicl.functional import categorical, class_weights
from metaicl.learner import Learner, Traits
from metaicl.learners.retrieval.sources import draw_items
from metaicl.spec import NotServed, TaskSpec
from metaicl.task import TaskDistribution

_N_TEXTS = 4096
_GAIN = 10.0  # a word is met rarely, so its background has to move further in an update than shared numbers do


class ChannelState(NamedTuple):
    """Word statistics of the demonstrations.

    Attributes:
        counts: (B, C, V), how often each word occurs in the demonstrations of each label.
        total: (B, C, 1), words in all.
    """

    counts: Tensor
    total: Tensor


class ChannelHead(Learner[ChannelState]):
    """Classify a text by p(x | y): the label whose demonstrations make its words likely (noisy channel).

    The words of a text are drawn one by one from the label's own distribution, the frequencies in its demonstrations
    smoothed towards a background,

        log p(x | y) = sum over words w of x of g_w log((count_yw + a b_w) / (count_y + a)),

    where the strength a, the background b (at first the word frequencies of meta-training texts) and the weight g_w
    of each word are meta-trained. All labels are equally likely at first sight. Every label has to explain the whole
    input; Min et al. found that the choice of demonstrations sways language models less this way than when they answer
    p(y | x) directly. `recipes/demonstration_draws.py` asks that of this head.

    It is its own update rule: counts of more rows are added (`update`), and adapting to all rows gives the same.

    Args:
        spec: A classification spec with token inputs.
        smoothing: Start of a, in words.

    Raises:
        ValueError: If the inputs are no tokens, or the spec is a regression spec.

    Reference:
        Min et al., 2022, arXiv:2108.04106 (channel prompting) and arXiv:2110.15943 (channel MetaICL), for the
        direction. Differs: their p(x | y) is a language model's; here it is a bag of words with a Dirichlet-smoothed
        unigram distribution (Zhai & Lafferty, 2001, "A study of smoothing methods for language models", section 3).
    """

    traits = Traits(kinds=("classification",), instead=(("regression", "RetrievalAugmented"),))

    background: Tensor

    def __init__(self, spec: TaskSpec, *, smoothing: float = 5.0) -> None:
        """Start from equal word frequencies; `prepare` counts them."""
        super().__init__(spec)
        if spec.vocabulary is None:
            raise NotServed(f"ChannelHead reads tokens; got {spec.x_kind} inputs. ProtoNet reads any")
        self.register_buffer("background", torch.zeros(spec.vocabulary))
        self.shift = nn.Embedding(spec.vocabulary, 1)
        self.log_weight = nn.Embedding(spec.vocabulary, 1)
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.log_weight.weight)
        self.log_smoothing = nn.Parameter(torch.tensor(check_positive("smoothing", smoothing)).log())

    def prepare(self, tasks: TaskDistribution, *, seed: int) -> None:
        """Take the background from the words of meta-training texts drawn at the address (seed, "memory")."""
        texts = draw_items(tasks, _N_TEXTS, rows_per_item=1, seed=seed, like=self.background).x.flatten()
        counts = torch.bincount(texts[texts != 0], minlength=len(self.background)) + 1.0
        self.background.copy_((counts / counts.mean()).log())

    def adapt(self, support: Examples) -> ChannelState:
        """Count the words of every label."""
        check_labels("support.y", support, self.spec.output_size)
        labels = class_weights(support.y, self.spec.output_size, support.mask, self.background.dtype)
        words = labels.new_zeros(*support.real.shape, len(self.background))
        words = words.scatter_add(-1, support.x, (support.x != 0).to(words.dtype))
        counts = labels.mT @ words
        return ChannelState(counts, counts.sum(-1, keepdim=True))

    def update(self, state: ChannelState, examples: Examples) -> ChannelState:
        """Add the counts of more rows."""
        more = self.adapt(examples)
        return ChannelState(state.counts + more.counts, state.total + more.total)

    def predict(self, state: ChannelState, x: Tensor) -> Distribution:
        """The posterior of the labels, all equally likely before x is seen."""
        background = torch.softmax(self.background + _GAIN * self.shift.weight[:, 0], 0)
        strength = self.log_smoothing.exp()
        words = ((state.counts + strength * background) / (state.total + strength)).log()  # (B, C, V)
        index = x.flatten(1)[:, None].expand(-1, words.shape[1], -1)
        likelihood = words.gather(2, index).unflatten(2, x.shape[1:])  # (B, C, Q, T)
        weight = (_GAIN * self.log_weight(x)[..., 0]).exp() * (x != 0)
        return categorical((likelihood * weight[:, None]).sum(-1).mT)
