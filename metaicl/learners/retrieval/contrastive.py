"""Contrastive pre-training of a retriever: inputs that share a tag, a class or a task, are drawn together."""

import torch
from torch import Tensor

from metaicl.checks import check_count, check_positive
from metaicl.episode import Episode
from metaicl.learners.retrieval.retriever import Retriever
from metaicl.task import TaskDistribution, derive_generator

_PAIRS_PER_UPDATE = 64


def contrastive_loss(queries: Tensor, keys: Tensor, tags: Tensor, *, temperature: float = 0.1) -> Tensor:
    """InfoNCE of pairs: each query against its own key and the keys of all pairs with another tag, in nats.

    Args:
        queries: Unit rows (n, D).
        keys: Unit rows (n, D); row i is the partner of query i.
        tags: long (n,), what the pair shares, on any device. Keys of the same tag are no negatives.
        temperature: The cosines are divided by it.

    Returns:
        The mean over the queries, and over both directions, a scalar. Chance is log n at most.

    Raises:
        ValueError: If the temperature is not positive.

    Reference:
        van den Oord et al. 2018, arXiv:1807.03748, equation 4, with the negatives of the same batch; pairs that share
        a tag as in Hu et al. 2023 (HICL), whose tags are hashtags. Keys of the same tag are masked (Khosla et al. 2020,
        arXiv:2004.11362, make positives of them).
    """
    logits = queries @ keys.mT / check_positive("temperature", temperature)
    tags = tags.to(logits.device)
    itself = torch.eye(len(tags), dtype=torch.bool, device=tags.device)
    alike = (tags[:, None] == tags) & ~itself
    logits = logits.masked_fill(alike, -torch.inf)
    both = torch.log_softmax(logits, 1).diagonal() + torch.log_softmax(logits, 0).diagonal()
    return -both.mean() / 2


def tagged_pairs(episode: Episode, source_classes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of inputs of an episode with one row per class, or per task, in support and query.

    Args:
        episode: Drawn with n_shot = n_query = 1.
        source_classes: See `TaskDistribution.source_classes`; where it is None a class is another one in every task.
            It goes to the device of the episode, if it is not there.

    Returns:
        Inputs (n, *x_shape) twice, row i of both of one tag, and tags, long (n,), on the device of the episode.
    """
    support, query = episode.support, episode.query
    (n_tasks, n_pairs), device = support.real.shape, support.y.device
    if support.y.dtype != torch.long:
        return support.x[:, 0], query.x[:, 0], torch.arange(n_tasks, device=device)
    first, second = support.y.argsort(1), query.y.argsort(1)
    task = torch.arange(n_tasks, device=device)[:, None]
    tags = torch.arange(n_tasks * n_pairs, device=device).reshape(n_tasks, n_pairs)
    if source_classes is not None and support.ids is not None:
        tags = source_classes.to(device)[support.ids[task, first]]
    return support.x[task, first].flatten(0, 1), query.x[task, second].flatten(0, 1), tags.flatten()


def pretrain_codes(
    retriever: Retriever,
    tasks: TaskDistribution,
    *,
    steps: int,
    seed: int,
    learning_rate: float = 1e-3,
    temperature: float = 0.1,
) -> list[float]:
    """Train the encoder of a learned retriever to tell tags apart, on pairs of meta-training rows.

    A tag is a source class where rows name their source, a class of an episode where they do not, and a task in
    regression. The retriever's fixed keys, which the encoder reads, must have been fitted (`Retriever.fill`).

    Args:
        retriever: In mode "learned"; trained in place.
        tasks: Their split "train" is sampled, at the address (seed, "contrastive"), and nothing else.
        steps: Updates of Adam.
        seed: Of the pairs.
        learning_rate: Of Adam.
        temperature: See `contrastive_loss`.

    Returns:
        The loss of every update, in nats.

    Raises:
        ValueError: If the retriever has nothing to train.
    """
    if retriever.mode != "learned":
        raise ValueError(f"pretrain_codes needs a retriever in mode 'learned'; got {retriever.mode!r}")
    parameters = [value for value in retriever.encoder.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=check_positive("learning_rate", learning_rate))
    generator, losses = derive_generator(seed, "contrastive"), []
    n_tasks = max(2, _PAIRS_PER_UPDATE // (tasks.spec.n_way or 1))
    classes = None if tasks.source_classes is None else tasks.source_classes.to(retriever.importance.device)
    for _ in range(check_count("steps", steps, minimum=0)):
        episode = tasks.sample(n_tasks, split="train", n_shot=1, n_query=1, generator=generator)
        episode = episode.to(retriever.importance.device, retriever.importance.dtype)
        first, second, tags = tagged_pairs(episode, classes)
        with torch.enable_grad():
            queries, keys = (retriever.codes(retriever.keys(x[:, None])) for x in (first, second))
            loss = contrastive_loss(queries, keys, tags, temperature=temperature)
            gradients = torch.autograd.grad(loss, parameters)
        for value, gradient in zip(parameters, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses
