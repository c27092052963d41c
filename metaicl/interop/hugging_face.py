"""Pretrained text encoders of Hugging Face as features; nothing is downloaded here."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sentence_features(model: Any, tokenizer: Any, *, max_length: int = 64) -> Callable[[list[str]], Tensor]:
    """A function from texts to the mean (texts, D) of a model's last states over the real tokens.

    Give it to `EmbeddedTexts`. A sentence-transformer needs none of this: its `encode` is such a function already.

    Args:
        model: A `transformers` encoder that answers with `last_hidden_state`, loaded by the caller; it is put into
            evaluation mode.
        tokenizer: Its tokenizer, with a padding token.
        max_length: Tokens kept of each text.

    Raises:
        ImportError: If transformers is missing.
        TypeError: If `model` is not a model of transformers.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError("sentence_features needs transformers: pip install transformers") from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers.PreTrainedModel; got {type(model).__name__}")
    model.eval()

    def features(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        tokens = tokens.to(model.device)
        with torch.no_grad():
            states = model(**tokens).last_hidden_state  # (texts, T, D)
        real = tokens["attention_mask"][..., None].to(states.dtype)
        return (states * real).sum(1) / real.sum(1).clamp(min=1)

    return features
