"""Texts as bags of weighted words: short sketches to search by, and inner products over all words to rank by."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from metaicl.functional import unit_rows
from metaicl.learners.retrieval.bank import Found, MemoryBank
from metaicl.learners.retrieval.content import hashed
from metaicl.learners.retrieval.exact_search import best_in_order
from metaicl.learners.retrieval.exclusion import Exclusion

SKETCH = 1024
"""Places of a sketch. A vocabulary that is no larger has a place for each word, and its sketches are the bags."""

_STEPS = 2**12
_PLACES = 4  # of a word in a sketch
_SPARE = 256  # items beyond k that sketches propose; of the best five among 8,192 headlines they miss 2 in 1,000


def word_weights(tokens: Tensor, importance: Tensor, real: Tensor | None = None) -> Tensor:
    """Weight of each place of an item, such that the bag of the item is the sum of its rows' unit bags.

    Nothing is divided by the number of rows: words that occur alike then weigh the same to the last bit.

    Args:
        tokens: long (..., R, T), 0 = padding.
        importance: (vocabulary,), weight of each word.
        real: bool (..., R), which rows there are; leading axes broadcast. None takes all.

    Returns:
        (..., R, T); a word that occurs again has a weight at every place.
    """
    weights = importance[tokens] * (tokens != 0)
    ordered, places = tokens.sort(-1).values, tokens.contiguous()
    times = torch.searchsorted(ordered, places, right=True) - torch.searchsorted(ordered, places)
    root = times.to(weights.dtype).sqrt()
    weights = unit_rows(weights * root) / root
    return weights if real is None else weights * real[..., None]


def unit_weights(words: Tensor, weights: Tensor) -> Tensor:
    """The weights (..., P) of words long (..., P), scaled such that their bags are unit vectors."""
    ordered, order = words.sort(-1)
    sums = F.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    last, first = (sums.gather(-1, torch.searchsorted(ordered, words, right=right)) for right in (True, False))
    squares = (weights * (last - first)).sum(-1, keepdim=True)  # each place times all that its word has
    return weights * torch.where(squares > 0, squares, 1).rsqrt()


def bags(words: Tensor, weights: Tensor, vocabulary: int) -> Tensor:
    """Bags (..., vocabulary) of words long (..., P) with weights (..., P)."""
    return weights.new_zeros(*weights.shape[:-1], vocabulary).scatter_add(-1, words, weights)


def sketches(words: Tensor, weights: Tensor, vocabulary: int) -> Tensor:
    """Unit sketches (..., SKETCH) of the bags of words (..., P).

    Their inner product is that of unit bags with an error of about .03.

    Each word adds to four places with random signs, the same ones everywhere, so that no two words are one.

    Reference:
        Kane & Nelson, 2014, "Sparser Johnson-Lindenstrauss transforms", section 1.
    """
    if vocabulary <= SKETCH:
        return unit_rows(bags(words, weights, SKETCH))
    drawn = hashed(words[..., None] * _PLACES + torch.arange(_PLACES, device=words.device)).flatten(-2)
    sign = 1 - 2 * ((drawn >> 40) & 1)
    return exact_numbers(unit_rows(bags(drawn % SKETCH, weights.repeat_interleave(_PLACES, -1) * sign, SKETCH)))


def exact_numbers(keys: Tensor) -> Tensor:
    """Unit keys as multiples of 2**-12: their inner products are exact in float32, in whatever order they are added."""
    return (keys * _STEPS).round() / _STEPS


def bag_values(tokens: Tensor, importance: Tensor) -> Mapping[str, Tensor]:
    """What `search_bags` reads of items long (M, R, T): values for a bank, with weights that make unit bags."""
    words = tokens.flatten(1).clone()
    return {"words": words, "word_weights": unit_weights(words, word_weights(tokens, importance).flatten(1))}


def search_bags(bank: MemoryBank, queries: Tensor, whole: Tensor, k: int, *, exclude: Exclusion | None = None) -> Found:
    """The k allowed items with the largest inner product of whole bags, among those that sketches propose.

    Args:
        bank: With sketches for keys, and `bag_values`.
        queries: Sketches (..., Q, SKETCH).
        whole: Unit bags (..., Q, vocabulary) of the same.
        k: How many.
        exclude: See `MemoryBank.search`.
    """
    found = bank.search(queries, max(k, min(k + _SPARE, len(bank))), exclude=exclude)
    with torch.no_grad():
        words, weights = bank.values["words"][found.index], bank.values["word_weights"][found.index]  # (..., Q, n, P)
        score = (whole.gather(-1, words.flatten(-2)).unflatten(-1, words.shape[-2:]) * weights).sum(-1)
        score, order = best_in_order(score.to(found.score.dtype).masked_fill(~found.real, -torch.inf), k)
        return Found(found.index.gather(-1, order), score, found.real.gather(-1, order))
