"""RAML on CLINC150 intents and HuffPost headlines: does retrieval help?  Li et al. 2023, arXiv:2309.04979.

Claim    On unseen classes, passages retrieved from meta-training texts make few-shot classification better than the
         same learner without them, and than random passages. The verdict is printed either way, with paired intervals.
         Ablations: 1 to 10 passages, a learned ranking, the mean token, passages for the support too, and passages of
         another domain (the texts of the other data set) in place of the same one.
Run      python recipes/raml_text.py --data FOLDER --out runs/raml_text      (FOLDER holds the two .jsonl.gz files)
         python recipes/raml_text.py --download --out runs/raml_text
Smoke    python recipes/raml_text.py --data FOLDER --smoke --out runs/raml_text
Differs  the memory holds texts of meta-training classes instead of 100-word passages of Wikipedia, and the encoder is a
         bag of words from scratch instead of ALBERT: published numbers are not comparable, the ablations are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaicl import Learner, ProtoNet, TaskSpec, TrainConfig, compare
from metaicl.learners.retrieval.raml import RAML
from metaicl.learners.retrieval.sources import draw_items
from metaicl.nets.backbones import BagOfWords
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, gain_criterion, option, run
from metaicl.report import Report
from metaicl.statistics import interval, paired
from metaicl.tasks import CLINC150
from metaicl.tasks.headlines import HuffPost
from metaicl.tasks.text import TextClasses
from metaicl.tasks.text_features import fit_tfidf

SHOTS = (1, 5)
OFF, ON, RANDOM = "k = 0", "k = 5", "k = 5, random"


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {
        "steps": 1, "n_episodes": 2, "seeds": 1, "processes": 1, "dim": 16, "n_items": 40, "vocabulary": 512,
        "everything": False,
    }  # fmt: skip

    data: str = option("", "folder with clinc150.jsonl.gz and huffpost.jsonl.gz")
    download: bool = option(False, "fetch the public originals instead")
    steps: int = option(150, "updates of each learner and seed")
    dim: int = option(256, "width of the word vectors")
    vocabulary: int = option(8192, "hashed words")
    n_items: int = option(2048, "meta-training texts in the memory")
    seeds: int = option(2, "training seeds")
    processes: int = option(2, "runs at a time")
    n_episodes: int = option(200, "meta-test episodes")
    everything: bool = option(True, "all ablations, instead of retrieval on, off and random")


def build(spec: TaskSpec, *, kind: Callable[..., Learner[Any]], idf: Tensor, dim: int, **settings: Any) -> Learner[Any]:
    """A learner on a bag of words that starts from inverse document frequencies."""
    return kind(spec, encoder=BagOfWords(spec.vocabulary or 0, dim=dim, importance=idf), **settings)


def learners(tasks: TextClasses, other: TextClasses, config: Config) -> dict[str, Any]:
    """The same learner with every kind of retrieval, and prototypes beside it; `other` is another domain."""
    words = partial(build, idf=fit_tfidf(tasks).idf, dim=config.dim)
    raml = partial(words, kind=RAML, n_items=config.n_items, residual=False)
    found: dict[str, Any] = {
        "ProtoNet": partial(words, kind=ProtoNet),
        OFF: partial(raml, retriever="none"),
        ON: partial(raml, k=5),
        RANDOM: partial(raml, k=5, retriever="random"),
    }
    if config.everything:
        elsewhere = draw_items(other, config.n_items, rows_per_item=1, seed=config.seed, like=torch.empty(0)).x[:, 0]
        found |= {
            "k = 1": partial(raml, k=1),
            "k = 10": partial(raml, k=10),
            "k = 5, learned": partial(raml, k=5, retriever="learned"),
            "k = 5, mean token": partial(raml, k=5, fusion="mean"),
            "k = 5, support too": partial(raml, k=5, support_passages=True),
            "k = 5, other domain": partial(words, kind=RAML, k=5, residual=False, passages=elsewhere),
        }
    return found


def compared(name: str, tasks: TextClasses, other: TextClasses, config: Config) -> Report:
    """All learners of one data set, on the same episodes after the same number of updates."""
    train = TrainConfig(
        steps=config.steps, n_shot=(1, 5), n_query=3, meta_batch_size=4, outer_lr=3e-3, schedule="cosine",
        validate_every=None,
    )  # fmt: skip
    report = compare(
        learners(tasks, other, config),
        {name: tasks},
        train=train,
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        n_shot=max(SHOTS),
        n_query=5,
        shots=SHOTS,
        batch_size=10,
        directory=config.out / f"{config.comparison.name}_{name}",
        processes=config.processes,
    )
    print(report)
    report.to_html(config.out / f"report_{name}.html")
    return report


def verdicts(name: str, report: Report) -> list[Criterion]:
    """Retrieval on against off and against random passages, paired; the other ablations are printed beside them."""
    criteria = []
    for shots in SHOTS:
        values = {one: report.values(name, one, "accuracy", shots=shots) for one in report.learners(name)}
        for other in values:
            found = interval(paired(values[ON], values[other]))
            if other != ON:
                ends = ", ".join(f"{100 * end:+.2f}" for end in found.ends or ())
                print(f"{name}, {shots}-shot: {ON} minus {other}: {100 * found.mean:+.2f} points, 95 % [{ends}]")
            if other in (OFF, RANDOM):
                text = f"{name}, {shots}-shot: accuracy of {ON} minus {other}"
                criteria.append(gain_criterion(text, values[ON], values[other]))
    return criteria


def main(config: Config) -> RecipeResult:
    """Train with every kind of retrieval on both data sets."""
    source = {"folder": config.data or None, "download": config.download}
    sizes = {"n_way": 5, "max_tokens": 16, "vocabulary": config.vocabulary}
    sets: dict[str, TextClasses] = {"CLINC150": CLINC150(**sizes, **source), "HuffPost": HuffPost(**sizes, **source)}
    criteria = []
    for (name, tasks), other in zip(sets.items(), reversed(sets.values()), strict=True):
        criteria += verdicts(name, compared(name, tasks, other, config))
    claim = "Passages of meta-training texts help on unseen classes of CLINC150 and HuffPost."
    return RecipeResult("raml_text", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
