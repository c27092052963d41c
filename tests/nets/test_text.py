"""Text encoders: padding changes nothing, against torch's own layers, and under the transforms learners use."""

import pytest
import torch
from torch import nn

from metaicl.learners.gradient.maml import MAML
from metaicl.nets.backbones import BagOfWords, EncoderWithHead
from metaicl.nets.lstm import BidirectionalLSTM
from metaicl.nets.text import (
    BiLSTM,
    HasTokenStates,
    TextCNN,
    WordTransformer,
    masked_softmax,
    sinusoids,
)
from metaicl.objectives import query_loss
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream
from metaicl.tasks.text import TextClasses
from metaicl.tasks.tokenizer import CharacterGrams, split_characters

VOCABULARY = 20
ENCODERS = {
    "TextCNN": lambda: TextCNN(VOCABULARY, dim=6, filters=4, widths=(1, 2, 3)),
    "BiLSTM": lambda: BiLSTM(VOCABULARY, dim=6, hidden=5),
    "WordTransformer": lambda: WordTransformer(VOCABULARY, dim=8, depth=2, heads=2),
    "BagOfWords": lambda: BagOfWords(VOCABULARY, dim=6),
}
STATES = [name for name in ENCODERS if name != "TextCNN"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return ENCODERS[name]().double()


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).detach().abs().max())


def tokens() -> torch.Tensor:
    return torch.tensor([[3, 7, 3, 9], [5, 1, 0, 0], [19, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_further_changes_nothing(name: str) -> None:
    encoder = build(name)
    short = encoder(tokens())
    padded = encoder(torch.nn.functional.pad(tokens(), (0, 5)))
    assert gap(short, padded) < 1e-12
    one_by_one = torch.cat([encoder(row[row != 0][None]) for row in tokens()[:3]])
    assert gap(short[:3], one_by_one) < 1e-12


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_without_a_token_is_the_origin_and_has_finite_derivatives(name: str) -> None:
    encoder = build(name)
    out = encoder(tokens())
    assert out.shape[0] == 4
    assert not out[3].any()
    out.square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters() if p.grad is not None)
    assert gap(out[0], out[1]) > 1e-3


@pytest.mark.parametrize("name", ["TextCNN", "BiLSTM", "WordTransformer"])
def test_word_order_counts(name: str) -> None:
    encoder = build(name)
    assert gap(encoder(torch.tensor([[3, 7, 9]])), encoder(torch.tensor([[9, 7, 3]]))) > 1e-3


@pytest.mark.parametrize("name", STATES)
def test_states_of_tokens(name: str) -> None:
    encoder = build(name)
    assert isinstance(encoder, HasTokenStates)
    states = encoder.states(tokens())
    assert states.shape[:2] == (4, 4)
    assert not states[tokens() == 0].any()
    padded = encoder.states(torch.nn.functional.pad(tokens(), (0, 3)))
    assert gap(padded[:, :4], states) < 1e-12


def test_text_vectors_are_made_of_the_states() -> None:
    transformer, bag = build("WordTransformer"), build("BagOfWords")
    expected = transformer.states(tokens())[1, :2].mean(0)  # type: ignore[operator]  # they have states
    assert torch.allclose(transformer(tokens())[1], expected, atol=1e-12)
    expected = bag.states(tokens())[1].sum(0) / 2**0.5  # type: ignore[operator]  # they have states
    assert torch.allclose(bag(tokens())[1], expected, atol=1e-9)


def test_cells_are_those_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = BidirectionalLSTM(3, 4).double(), nn.LSTM(3, 4, bidirectional=True, batch_first=True).double()
    with torch.no_grad():
        ours.bias.normal_()
        for direction, suffix in enumerate(("", "_reverse")):
            order = torch.arange(16).unflatten(0, (4, 4))[[1, 2, 0, 3]].flatten()  # torch: enter, keep, new, leave
            getattr(theirs, f"weight_ih_l0{suffix}").copy_(ours.from_input[direction].mT[order])
            getattr(theirs, f"weight_hh_l0{suffix}").copy_(ours.from_state[direction].mT[order])
            getattr(theirs, f"bias_ih_l0{suffix}").copy_(ours.bias[direction, 0][order])
            getattr(theirs, f"bias_hh_l0{suffix}").zero_()
    x = torch.randn(2, 5, 3, dtype=torch.double)
    assert torch.allclose(ours(x, torch.ones(2, 5, dtype=torch.bool)), theirs(x)[0], atol=1e-12)
    gaps = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    found = ours(x, gaps)
    for row in range(2):
        assert torch.allclose(found[row, gaps[row]], theirs(x[row : row + 1, gaps[row]])[0][0], atol=1e-12)


def test_filters_against_a_loop() -> None:
    encoder = build("TextCNN")
    expected = []
    for one in encoder.filters:  # type: ignore[union-attr]  # a module list
        width = one.kernel_size[0]
        h = torch.cat([encoder.vectors(torch.tensor([5, 1])), torch.zeros(width, 6)]).double()  # type: ignore[operator]
        windows = [
            (one.weight * h[i : i + width].mT).sum((1, 2)) + one.bias
            for i in range(2)  # windows that start at a token
        ]
        expected.append(torch.stack(windows).amax(0).clamp(min=0))
    assert torch.allclose(encoder(tokens())[1], torch.cat(expected), atol=1e-12)


def test_places_of_any_number() -> None:
    like = torch.zeros(1, dtype=torch.double)
    found = sinusoids(50, 4, like=like)
    assert torch.allclose(found[7], torch.tensor([7.0, 0.07, 7.0, 0.07]).double().sin().where(
        torch.tensor([True, True, False, False]), torch.tensor([7.0, 0.07, 7.0, 0.07]).double().cos()
    ))  # fmt: skip
    weights = masked_softmax(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[True, False], [False, False]]))
    assert weights.tolist() == [[1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ENCODERS)
def test_maml_differentiates_twice_through(name: str) -> None:
    texts = [f"word{c} thing{i} end" for c in range(6) for i in range(4)]
    tasks = TextClasses(texts, [c for c in range(6) for _ in range(4)], n_way=2, max_tokens=5, vocabulary=VOCABULARY,
                        class_splits={"train": [0, 1], "validation": [2, 3], "test": [4, 5]})  # fmt: skip
    learner = MAML(tasks.spec, net=EncoderWithHead(build(name), tasks.spec).double(), inner_steps=2).double()
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=2, chunk_size=2)[0]
    query_loss(learner, episode).mean().backward()
    slopes = [p.grad for p in learner.parameters() if p.grad is not None]
    assert slopes
    assert all(bool(slope.isfinite().all()) for slope in slopes)
    assert max(float(slope.abs().max()) for slope in slopes) > 1e-6


def test_characters_as_tokens() -> None:
    assert split_characters("Hé  lo\n!") == ["h", "é", " ", "l", "o", " ", "!"]
    texts = [f"{a}{b}" for a in "abcdef" for b in "uvwxyz"]
    tasks = TextClasses(texts, [t[0] for t in texts], n_way=2, max_tokens=4, vocabulary=512, splitter=split_characters,
                        class_splits={"train": "ab", "validation": "cd", "test": "ef"})  # fmt: skip
    assert tasks.spec == TaskSpec("classification", (4,), "tokens", n_way=2, vocabulary=512)
    rows = tasks.rows(torch.arange(36))
    assert (rows != 0).sum(1).eq(2).all()
    assert len({int(row[0]) for row in rows}) == 6


def test_grams_of_words() -> None:
    grams = CharacterGrams(3, 4)
    assert grams("Cat, a") == ["<cat>", "<ca", "cat", "at>", "<cat", "cat>", "<a>"]
    with pytest.raises(ValueError, match="longest must be an int >= 3"):
        CharacterGrams(3, 2)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: TextCNN(9, widths=()), "widths must name at least one width"),
        (lambda: TextCNN(9, widths=(0,)), "widths must be an int >= 1; got 0"),
        (lambda: WordTransformer(9, dim=7), "dim must be even"),
        (lambda: WordTransformer(9, dim=6, heads=4), "heads must divide dim = 6; got 4"),
        (lambda: BiLSTM(1), "vocabulary must be an int >= 2"),
    ],
)
def test_bad_sizes_are_named(build_it, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()
