"""CLINC150 and Banking77, 5-way intent classification by class split.  Protocol of Dopierre et al. 2021.

Claim    At least one learner is clearly above prototypes of TF-IDF vectors, the floor without meta-learning. A learner
         of each family is held against it on the same episodes, with intervals that are widened for their number.
Run      python recipes/few_shot_intents.py --data FOLDER --out runs/few_shot_intents
         python recipes/few_shot_intents.py --download --out runs/few_shot_intents
         FOLDER holds clinc150.jsonl.gz and banking77.jsonl.gz; --splits 01 02 03 04 05 is the full protocol, and what
         `make reproduce` runs; --features compares features without training
Smoke    python recipes/few_shot_intents.py --data FOLDER --smoke --out runs/few_shot_intents
Differs  no pretrained language model: words start from co-occurrence in meta-training texts and random numbers;
         published numbers (96 % and more with BERT) are not comparable, learners and floor on the same episodes are.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from peers.text_families import above_the_floor, compare_features, compared

from metaicl.recipe import RecipeConfig, RecipeResult, option, run
from metaicl.tasks import CLINC150, Banking77
from metaicl.tasks.text_features import fit_word_vectors

SETS = {"CLINC150": CLINC150, "Banking77": Banking77}
PUBLISHED_FLOOR = {"CLINC150 01": {1: 0.748, 5: 0.921}, "Banking77 01": {1: 0.641, 5: 0.852}}


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {
        "steps": 2, "n_episodes": 4, "n_validation": 4, "seeds": 1, "processes": 1, "random": 8, "dim": 16,
        "datasets": ("CLINC150",),
    }  # fmt: skip

    data: str = option("", "folder with clinc150.jsonl.gz and banking77.jsonl.gz")
    download: bool = option(False, "fetch the public originals instead")
    datasets: tuple[Literal["CLINC150", "Banking77"], ...] = option(("CLINC150", "Banking77"), "which sets")
    splits: tuple[str, ...] = option(("01",), "class splits, 01 to 05")
    features: bool = option(False, "train nothing: nearest class means of words, runs of characters and word vectors")
    steps: int = option(400, "updates of each learner")
    dim: int = option(100, "places of a word for the company it keeps")
    random: int = option(412, "places of a word for random numbers, which tell unseen words apart")
    seeds: int = option(3, "training seeds")
    processes: int = option(2, "runs at a time")
    n_validation: int = option(100, "meta-validation episodes, four times in a run")
    n_episodes: int = option(600, "meta-test episodes")


def main(config: Config) -> RecipeResult:
    """Train on the meta-training intents, judge on unseen ones."""
    criteria = []
    for name in config.datasets:
        for split in config.splits:
            task = f"{name} {split}"
            tasks = SETS[name](n_way=5, split=split, folder=config.data or None, download=config.download)
            # Each split has words of its own, fitted on its meta-training texts.
            fitted = fit_word_vectors(tasks, dim=config.dim, random=config.random, smoothing=None)
            published = PUBLISHED_FLOOR.get(task, {})
            if config.features:
                criteria += compare_features(task, tasks, fitted, config, published)
            else:
                criteria += above_the_floor(compared(task, tasks, fitted, config), task, published)
    if config.features:
        return RecipeResult("few_shot_intents", "TF-IDF prototypes are where they should be.", config, criteria)
    claim = "On unseen intents at least one learner is above TF-IDF prototypes."
    return RecipeResult("few_shot_intents", claim, config, criteria)


if __name__ == "__main__":
    run(main, Config)
