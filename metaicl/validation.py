"""The validation of a training run: always the same tasks, whatever the run is."""

import math

import torch

from metaicl.distributed import add_up, share
from metaicl.learner import Learner
from metaicl.objectives import query_loss
from metaicl.task import EVAL_SEED, EpisodeStream, Split, TaskDistribution
from metaicl.train_config import TrainConfig
from metaicl.training import device_of, isolated_randomness, place, training_mode


def addressed_stream(tasks: TaskDistribution, config: TrainConfig, split: Split) -> EpisodeStream:
    """Tasks of a split with the rows of `config`, at the address of every evaluation."""
    return EpisodeStream(tasks, seed=EVAL_SEED, split=split, n_shot=config.n_shot, n_query=config.n_query)


def validation_loss(learner: Learner, tasks: TaskDistribution, config: TrainConfig, *, step: int) -> float:
    """Mean loss of the queries in nats per row, on `config.n_validation` tasks of the validation split.

    Args:
        learner: What to validate, put in eval mode meanwhile.
        tasks: On what.
        config: Of the training run.
        step: Updates done, for the message.

    Raises:
        FloatingPointError: If it is NaN or infinite.
    """
    stream = addressed_stream(tasks, config, "validation")
    size = config.micro_batch_size or config.meta_batch_size
    own, device = share(config.n_validation), device_of(learner)
    total = torch.zeros((), dtype=torch.float64, device=device)
    with training_mode(learner, False), torch.no_grad(), isolated_randomness(EVAL_SEED, device):
        for episode in stream.batches(own.start, own.stop, batch_size=size):
            total += query_loss(learner, place(episode, learner)).double().sum()
    loss = float(add_up([total])[0]) / config.n_validation
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss after step {step} is {loss}; the last checkpoint stands")
    return loss
