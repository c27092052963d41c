"""Nothing of held-out classes reaches what a learner prepares: bank, vocabulary, statistics, checkpoint.

Each source is built twice; only rows of held-out classes differ, or which of these classes they are of. What is
prepared must not differ in a single bit.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metaicl.learners
from metaicl.checkpoint import save_learner
from metaicl.episode import Examples
from metaicl.learner import Learner, Prepares
from metaicl.learners.metric.protonet import ProtoNet
from metaicl.learners.retrieval.bank import MemoryBank
from metaicl.learners.retrieval.content import content_ids
from metaicl.learners.retrieval.exclusion import Exclusion
from metaicl.spec import TaskSpec
from metaicl.task import EpisodeStream, TaskDistribution
from metaicl.tasks.images import ImageClasses
from metaicl.tasks.rows import ArrayClasses
from metaicl.tasks.tables import Table
from metaicl.tasks.tabular import TabularClasses
from metaicl.tasks.text import TextClasses

N_CLASSES, N_ROWS, HELD_OUT = 18, 6, 12  # classes 12 .. 17 are held out
SPLITS = {"train": list(range(12)), "validation": [12, 13, 14], "test": [15, 16, 17]}
LABELS = torch.arange(N_CLASSES).repeat_interleave(N_ROWS)
EXCHANGED = LABELS.clone()  # rows of validation and test classes change places
EXCHANGED[LABELS >= HELD_OUT] = (LABELS[LABELS >= HELD_OUT] - HELD_OUT + 3) % 6 + HELD_OUT
CANARY = 123.456  # a value that occurs nowhere else


def arrays(with_canaries: bool, labels: torch.Tensor = LABELS) -> TaskDistribution:
    x = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))
    if with_canaries:
        x = torch.where(LABELS[:, None] >= HELD_OUT, CANARY + x, x)
    spec = TaskSpec("classification", (4,), n_way=3)
    return ArrayClasses(spec, x, labels=labels, class_splits=SPLITS, class_names=list(range(N_CLASSES)))


def images(with_canaries: bool, labels: torch.Tensor = LABELS) -> TaskDistribution:
    pixels = torch.rand(len(LABELS), 1, 16, 16, generator=torch.Generator().manual_seed(0))
    if with_canaries:
        pixels[LABELS >= HELD_OUT] = pixels[LABELS >= HELD_OUT].flip(-1).round()
    return ImageClasses(pixels, labels, n_way=3, class_splits=SPLITS)


def texts(with_canaries: bool, labels: torch.Tensor = LABELS) -> TextClasses:
    rows = []
    for row, label in enumerate(LABELS.tolist()):
        other = "canary bird" if with_canaries and label >= HELD_OUT else "plain words"
        rows.append(f"topic{label % 4} item{row} {other} word{row % 5}")
    return TextClasses(rows, labels.tolist(), n_way=3, class_splits=SPLITS, words="fitted", max_tokens=6)


def tables(with_canaries: bool, labels: torch.Tensor = LABELS) -> TaskDistribution:
    """Six tables of three classes, four of them for training; the labels of held-out ones count as given."""
    x = arrays(with_canaries).rows(torch.arange(len(LABELS))).numpy().reshape(6, 3 * N_ROWS, 4)
    pool = [Table(f"t{i}", rows, y) for i, (rows, y) in enumerate(zip(x, labels.numpy().reshape(6, -1), strict=True))]
    if with_canaries:  # held-out tables may have any number of classes
        pool[4:] = [Table(table.name, table.x, np.arange(3 * N_ROWS) // 2) for table in pool[4:]]
    return TabularClasses(
        pool, n_way=3, n_features=4, splits={"train": ["t0", "t1", "t2", "t3"], "validation": ["t4"], "test": ["t5"]}
    )


SOURCES: dict[str, Callable[..., TaskDistribution]] = {
    "arrays": arrays,
    "images": images,
    "tables": tables,
    "texts": texts,
}


KINDS = {
    kind.__name__: kind
    for kind in (getattr(metaicl.learners, name) for name in metaicl.learners.__all__)
    if inspect.isclass(kind) and hasattr(kind, "prepare")
}
# Which sources a learner does not serve, and what it says there. Every other pair is tested, whatever is added.
REFUSED = {
    "ChannelHead": (("arrays", "images", "tables"), "reads tokens"),
    "DistributionalSignatures": (("arrays", "images", "tables"), "needs token inputs"),
    "ExplanationRetrieval": (("arrays", "images", "tables"), "needs token inputs"),
    "RotationLabels": (("arrays", "tables", "texts"), "need square images"),
}
PAIRS = [(name, source) for name in KINDS for source in SOURCES if source not in REFUSED.get(name, ((), ""))[0]]


def build(name: str, spec: TaskSpec) -> Learner:
    """A learner with `prepare`, small where it can be."""
    small = {"learner": ProtoNet, "n_items": 24, "k": 2}
    known = inspect.signature(KINDS[name]).parameters
    torch.manual_seed(0)
    return KINDS[name](spec, **{name: value for name, value in small.items() if name in known})


def prepared(name: str, tasks: TaskDistribution) -> Any:
    learner = build(name, tasks.spec)
    assert isinstance(learner, Prepares)
    torch.manual_seed(1)
    learner.prepare(tasks, seed=0)
    return learner


def test_every_learner_that_prepares_is_tested_here() -> None:
    for module in pkgutil.walk_packages(metaicl.learners.__path__, "metaicl.learners."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(kind) and issubclass(kind, Learner) and hasattr(kind, "prepare"):
                tested = any(issubclass(other, kind) for other in KINDS.values())  # itself, or it is a common base
                assert tested, f"export {name} from metaicl.learners, so that its prepare is tested for leaks"
    assert set(REFUSED) <= set(KINDS)
    assert {name for name, _ in PAIRS} == set(KINDS)


@pytest.mark.parametrize(("name", "source"), [(name, source) for name in REFUSED for source in REFUSED[name][0]])
def test_what_is_left_out_is_refused(name: str, source: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        build(name, SOURCES[source](False).spec)


@pytest.mark.parametrize(("name", "source"), PAIRS)
def test_what_is_prepared_does_not_depend_on_held_out_rows(name: str, source: str) -> None:
    plain, planted = (SOURCES[source](with_canaries) for with_canaries in (False, True))
    if source == "texts":
        assert plain.spec == planted.spec  # the vocabulary, too
    ours, theirs = prepared(name, plain).state_dict(), prepared(name, planted).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), f"{key} depends on held-out rows"


@pytest.mark.parametrize(("name", "source"), PAIRS)
def test_what_is_prepared_does_not_tell_held_out_classes(name: str, source: str) -> None:
    plain, exchanged = (SOURCES[source](False, labels) for labels in (LABELS, EXCHANGED))
    ours, theirs = prepared(name, plain).state_dict(), prepared(name, exchanged).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), f"{key} depends on the classes of held-out rows"


def test_the_check_would_notice() -> None:
    plain, planted = arrays(False), arrays(True)
    wrong = {"train": list(range(6, 18)), "validation": [0, 1, 2], "test": [3, 4, 5]}
    leaky = [
        ArrayClasses(tasks.spec, tasks.rows(torch.arange(len(LABELS))), labels=LABELS, class_splits=wrong,
                     class_names=list(range(N_CLASSES)))
        for tasks in (plain, planted)
    ]  # fmt: skip
    ours, theirs = (prepared("RetrievalAugmented", tasks).bank.values["x"] for tasks in leaky)
    assert not torch.equal(ours, theirs)


def test_no_held_out_row_class_or_word_is_kept(tmp_path: Path) -> None:
    tasks = arrays(True)
    learner = prepared("RetrievalAugmented", tasks)
    assert int(learner.bank.class_ids.max()) < HELD_OUT
    assert int(learner.sources.classes.max()) < HELD_OUT
    assert int(learner.bank.row_ids.max()) < HELD_OUT * N_ROWS
    canary = content_ids(tasks.rows(torch.arange(HELD_OUT * N_ROWS, len(LABELS))), tasks.spec)
    kept = content_ids(learner.bank.values["x"], tasks.spec)
    assert not bool(torch.isin(kept, canary).any())
    save_learner(learner, tmp_path / "weights")
    whole = (tmp_path / "weights").read_bytes()
    for row in tasks.rows(torch.arange(HELD_OUT * N_ROWS, len(LABELS))):
        assert row.numpy().tobytes() not in whole
    assert tasks.rows(learner.bank.row_ids[0, :1])[0].numpy().tobytes() in whole  # a row that is there is found
    words = texts(True)
    unknown = words.rows(torch.tensor([len(LABELS) - 1]))[0]
    assert unknown[2:4].tolist() == [1, 1]  # "canary bird"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n_items=st.integers(2, 60), backend=st.sampled_from(["exact", "faiss-flat"]))
def test_a_query_never_retrieves_itself_or_its_copies(seed: int, n_items: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = TaskSpec("classification", (3,), n_way=2)
    rows = torch.randn(n_items, 3, generator=generator)[torch.randint(n_items, (n_items,), generator=generator)]
    bank = MemoryBank(backend=backend, chunk=16)
    bank.add(rows, {"x": rows}, rows=content_ids(rows, spec))
    queries = rows[torch.randint(n_items, (8,), generator=generator)]
    found = bank.search(queries, 3, exclude=Exclusion(rows=content_ids(queries, spec)[:, None]))
    copies = (bank.values["x"][found.index] == queries[:, None]).all(-1)
    assert not bool((copies & found.real).any())
    others = (rows != queries[:, None]).any(-1).sum(1)
    assert torch.equal(found.real.sum(1), others.clamp(max=3))


def test_a_query_among_retrieved_rows_is_answered_without_them() -> None:
    tasks = arrays(False)
    tasks.source_classes = None  # rows have names, classes have none
    learner = prepared("RetrievalAugmented", tasks)
    support = tasks.sample(4, split="train", n_shot=1, n_query=1, generator=torch.Generator().manual_seed(3)).support
    state = learner.adapt(support)
    group = learner.bank.values["content"][:, 0]
    place = (state.content[0, 1, 0] == group).nonzero()[0, 0]  # the first row of the first retrieved set of task 0
    query = learner.bank.values["x"][place, :1].expand(4, 1, 4)
    # Moving all the weight of a set that holds the query elsewhere changes nothing; it has none.
    moved = state.log_weights.clone()
    moved[0, 1] = 50.0
    ours, theirs = learner.predict(state, query), learner.predict(state._replace(log_weights=moved), query)
    torch.testing.assert_close(ours.logits[0], theirs.logits[0])
    other = query + 1.0
    assert not torch.allclose(
        learner.predict(state, other).logits[0], learner.predict(state._replace(log_weights=moved), other).logits[0]
    )


@pytest.mark.parametrize("inner", ["DemonstrationRetrieval", "RAML", "DistributionalSignatures", "RetrievalAugmented"])
@pytest.mark.parametrize("outer", ["RetrievalAugmented", "DemonstrationRetrieval"])
def test_a_retrieval_learner_inside_another_keeps_own_classes_out(
    outer: str, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = texts(False)
    reader = build(inner, tasks.spec)
    shown: list[Examples] = []
    monkeypatch.setattr(reader, "adapt", lambda support: shown.append(support) or type(reader).adapt(reader, support))
    learner = KINDS[outer](tasks.spec, learner=reader, n_items=24, k=2).eval()
    learner.prepare(tasks, seed=0)
    episode = EpisodeStream(tasks, seed=0, split="train", n_shot=1, n_query=2, chunk_size=4)[0]
    support, n_own = episode.support, episode.support.n_rows
    learner(support, episode.query.x)
    times = len(shown[0]) // len(support)
    ids = shown[0].ids
    assert times == (3 if outer == "RetrievalAugmented" else 3 * 6)  # sets of a task, or of each of its queries
    assert ids is not None
    assert torch.equal(ids[:, :n_own], support.ids.repeat_interleave(times, 0))
    assert bool(shown[0].real[:, n_own:].any())
    assert bool((ids[:, n_own:] == -1).all())
    if inner in ("DemonstrationRetrieval", "RAML"):
        x, own = episode.query.x.repeat_interleave(times, 0), tasks.source_classes[ids[:, :n_own]]
        found = reader.retriever(x, 2, classes=reader.sources.of(shown[0]))
        classes = reader.retriever.bank.class_ids[found.index]
        assert int(found.real.sum()) == x[..., 0].numel() * 2
        assert not bool((classes[..., None] == own[:, None, None]).any())
