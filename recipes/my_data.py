"""Data of your own: a CSV of rows and a folder of images, each made into a task distribution in one call.

Without arguments the recipe first writes an example of both (scikit-learn's digits as a CSV, rendered letters as an
image folder) and then treats them as if they were yours.

Run      python recipes/my_data.py --out runs/my_data
         python recipes/my_data.py --csv mine.csv --target label --images my_folder
Smoke    python recipes/my_data.py --smoke --out runs/my_data
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metaicl import (
    MAML,
    Glyphs,
    ImageClasses,
    InContextTransformer,
    ProtoNet,
    TrainConfig,
    check_tasks,
    compare,
    tasks_from_csv,
)
from metaicl.learners import Constant, Logistic
from metaicl.recipe import Criterion, RecipeConfig, RecipeResult, option, run


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Options of this recipe."""

    SMOKE: ClassVar = {"steps": 5, "n_episodes": 20, "seeds": 1}

    csv: str = option("", "a CSV file with a header; empty writes an example")
    target: str = option("label", "its column of classes")
    images: str = option("", "a folder with one subfolder per class; empty writes an example")
    n_way: int = option(3, "classes per task; meta-validation and meta-test each need at least as many")
    steps: int = option(200, "updates of each learner")
    n_episodes: int = option(600, "meta-test episodes")
    seeds: int = option(3, "training seeds")


def main(config: Config) -> RecipeResult:
    """Read, check, train, compare."""
    table = Path(config.csv) if config.csv else write_example_csv(config.out / "example.csv")
    folder = Path(config.images) if config.images else write_example_images(config.out / "example_images")
    share = {"train": 0.4, "validation": 0.3, "test": 0.3}
    tasks = {
        "my table": tasks_from_csv(table, target=config.target, n_way=config.n_way, fractions=share),
        "my images": ImageClasses.from_folder(folder, n_way=config.n_way, size=28),
    }
    for name, distribution in tasks.items():
        check_tasks(distribution)
        print(f"{name}: passes check_tasks; {distribution.spec}")
    train = TrainConfig(
        steps=config.steps, meta_batch_size=4, n_shot=1, n_query=5, seed=config.seed, validate_every=None
    )
    learners = {"ProtoNet": ProtoNet, "MAML": MAML, "Transformer": InContextTransformer}
    floors = {"logistic": Logistic, "constant": Constant}
    report = compare(
        learners | floors,
        tasks,
        train=train,
        n_episodes=config.n_episodes,
        seeds=config.seeds,
        directory=config.comparison,
    )
    print(report)
    report.to_html(config.out / "report.html")
    criteria = []
    for name in tasks:
        found = report.interval(name, "ProtoNet")
        ci = found.ends
        criteria.append(Criterion(f"{name}: ProtoNet accuracy, 1-shot", found.mean, ">=", 1.5 / config.n_way, ci=ci))
    return RecipeResult("my_data", "A CSV and an image folder train few-shot learners.", config, criteria)


def write_example_csv(path: Path) -> Path:
    """Scikit-learn's 8 x 8 digits, one row per image."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"pixel_{i}" for i in range(64)] + ["label"])
        writer.writerows([*row, f"digit {label}"] for row, label in zip(pixels, labels, strict=True))
    return path


def write_example_images(folder: Path) -> Path:
    """Thirty rendered letters, twenty pictures each, in one subfolder per letter."""
    from PIL import Image

    glyphs = Glyphs(n_way=5)
    rows = glyphs.source_classes
    assert rows is not None  # ImageClasses always has them
    for c in glyphs.class_splits["train"][:30].tolist():
        target = folder / f"letter_{c:04d}"
        target.mkdir(parents=True, exist_ok=True)
        ids = (rows == c).nonzero().flatten()[:20]
        for row, image in zip(ids.tolist(), glyphs.rows(ids), strict=True):
            Image.fromarray((image[0] * 255).byte().numpy()).save(target / f"{row}.png")
    return folder


if __name__ == "__main__":
    run(main, Config)
