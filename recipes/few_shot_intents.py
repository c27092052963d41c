"""CLINC150 and Banking77, 5-way intent classification by class split.  Protocol of Dopierre et al. 2021.

Claim    Every family does better than prototypes of TF-IDF vectors, the floor without meta-learning.
Run      python recipes/few_shot_intents.py --data FOLDER --out runs/few_shot_intents   (FOLDER holds clinc150.jsonl.gz)
         python recipes/few_shot_intents.py --download --out runs/few_shot_intents
Smoke    python recipes/few_shot_intents.py --data FOLDER --smoke --out runs/few_shot_intents
Differs  no pretrained language model: texts are bags of hashed words; published numbers (96 % and more with BERT) are
         not comparable, learners and the floor on the same episodes are.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaicl import MAML, InContextTransformer, ProtoNet, RidgeHead, TaskSpec, TrainConfig, compare
from metaicl.functional import unit_rows
from metaicl.learners import RetrievalAugmented
from metaicl.nets.backbones import BagOfWords, EncoderWithHead
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run
from metaicl.tasks import CLINC150

SHOTS = (1, 5)
PUBLISHED_FLOOR = {1: 0.748, 5: 0.921}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 5, "n_episodes": 20, "seeds": 1}

    data: str = option("", "folder with clinc150.jsonl.gz")
    download: bool = option(False, "fetch the public original instead")
    split: str = option("01", "class split, 01 to 05")
    steps: int = option(400, "updates of each learner")
    seeds: int = option(3, "training seeds")
    n_episodes: int = option(600, "meta-test episodes")


class TfIdf(nn.Module):
    """Unit-length TF-IDF vectors, document frequencies from the meta-training classes only.

    Args:
        documents: Token ids (documents, T), 0 = padding.
        vocabulary: Number of token ids.
    """

    def __init__(self, documents: Tensor, vocabulary: int) -> None:
        """Count documents per word."""
        super().__init__()
        counts = Counter(token for row in documents.tolist() for token in set(row) - {0})
        idf = [math.log((1 + len(documents)) / (1 + counts[token])) + 1 for token in range(vocabulary)]
        self.idf: Tensor
        self.register_buffer("idf", torch.tensor(idf))

    def forward(self, tokens: Tensor) -> Tensor:
        """Vectors (rows, vocabulary) of token ids (rows, T)."""
        weights = self.idf[tokens] * (tokens != 0)
        return unit_rows(weights.new_zeros(len(tokens), len(self.idf)).scatter_add(1, tokens, weights))


def encoder(spec: TaskSpec) -> BagOfWords:
    """The same word encoder for every family: wide, so that random vectors keep texts apart."""
    return BagOfWords(spec.vocabulary or 0, dim=256)


def families(floor: ProtoNet) -> dict[str, Any]:
    """One learner of each family, all on the same encoder."""
    return {
        "ProtoNet": lambda spec: ProtoNet(spec, encoder=encoder(spec)),
        "RidgeHead": lambda spec: RidgeHead(spec, encoder=encoder(spec)),
        "MAML": lambda spec: MAML(spec, net=EncoderWithHead(encoder(spec), spec), inner_lr=0.1, inner_steps=5),
        "Transformer": lambda spec: InContextTransformer(spec, encoder=encoder(spec), dim=128),
        "retrieval + ProtoNet": lambda spec: RetrievalAugmented(
            spec, learner=lambda same: ProtoNet(same, encoder=encoder(same))
        ),
        "TF-IDF prototypes": floor,
    }


def main(config: Config) -> RecipeResult:
    """Train on the meta-training intents, judge on unseen ones."""
    tasks = CLINC150(n_way=5, split=config.split, folder=config.data or None, download=config.download)
    assert tasks.source_classes is not None  # every distribution over labeled rows has them
    owned = torch.isin(tasks.source_classes, tasks.class_splits["train"]).nonzero().flatten()
    tfidf = TfIdf(tasks.rows(owned), tasks.spec.vocabulary or 0)
    floor = ProtoNet(tasks.spec, encoder=tfidf, learn_temperature=False)
    train = TrainConfig(
        steps=config.steps, n_shot=(1, 5), n_query=5, meta_batch_size=8, outer_lr=1e-3, schedule="cosine"
    )
    report = compare(
        families(floor),
        {"CLINC150": tasks},
        train=train,
        n_episodes=config.n_episodes,
        seeds=range(config.seed, config.seed + config.seeds),
        n_shot=max(SHOTS),
        n_query=15,
        shots=SHOTS,
        directory=config.out / "comparison",
    )
    print(report)
    report.to_html(config.out / "report.html")
    criteria = []
    for shots in SHOTS:
        bound = report.interval("CLINC150", "TF-IDF prototypes", shots=shots).mean
        for name in report.learners("CLINC150", finished=True):
            found = report.interval("CLINC150", name, shots=shots)
            ci = None if found.low is None or found.high is None else (found.low, found.high)
            reference = PUBLISHED_FLOOR[shots] if name == "TF-IDF prototypes" else None
            criteria.append(Criterion(f"{name}, {shots}-shot", found.mean, ">=", bound, ci=ci, reference=reference))
    claim = "On unseen CLINC150 intents every family is above TF-IDF prototypes."
    return RecipeResult("few_shot_intents", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
