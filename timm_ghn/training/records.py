"""What a training run leaves for people: a CSV log, its curves as a picture, and the model card."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_ghn.checkpoints import card
from timm_ghn.files import whole_file
from timm_ghn.hypernet import GHNConfig

logger = logging.getLogger("timm_ghn.training")

COLUMNS = (
    "step", "minutes", "steps_per_second", "learning_rate", "loss", "accuracy", "gradient_norm", "skipped",
    "val_mean", "val_min", "val_max",
)  # fmt: skip
FAMILY_COLUMNS = ("step", "family", "val_networks", "val_mean", "trained", "norm_median", "norm_90", "norm_max")


class Log:
    """A CSV file with a row every so many steps; a resumed run goes on where its checkpoint was written."""

    def __init__(self, path: Path, first_step: int, columns: Sequence[str] = COLUMNS):
        rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first_step]
        with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, **row: float | str) -> None:
        """Appends a row; columns that are not given stay empty."""
        self._writer.writerow({n: value if isinstance(value, str) else f"{value:.6g}" for n, value in row.items()})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def plot_curves(log: Path, picture: Path) -> None:
    """Draws loss and accuracies over the steps; without matplotlib it only says so."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('no curves are drawn: pip install "timm-ghn[plot]"')
        return
    from matplotlib.figure import Figure

    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def series(column: str) -> tuple[list[float], list[float]]:
        given = [row for row in rows if row[column]]
        return [float(row["step"]) for row in given], [float(row[column]) for row in given]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*series("loss"))
    left.set(xlabel="step", ylabel="training loss")
    right.plot(*series("accuracy"), label="training batches")
    steps, means = series("val_mean")
    right.plot(steps, means, marker=".", label="validation, unseen architectures")
    right.fill_between(steps, series("val_min")[1], series("val_max")[1], alpha=0.2, label="their range")
    right.set(xlabel="step", ylabel="top-1 of predicted weights, %")
    right.legend()
    with whole_file(picture) as part:
        figure.savefig(part, format="png")


_DETAILS = """| | |
|---|---|
| Architecture-steps | {architecture_steps:,} ({steps:,} steps of {meta_batch} networks, {batch_size} images each) |
| Time | {minutes:.0f} minutes on {processes} |
| Validation | {validation} |

Top-1 is that of predicted weights without a gradient step, with batch norms using the statistics of batches of
{val_batch} images, on {val_images} images and {val_architectures} architectures, neither of which it was trained on.

## GHN

```json
{ghn}
```

## Training

```json
{training}
```
"""


def model_card(config: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The README of an exported GHN: a run's configuration, and the `facts` that the template asks for."""
    training = {name: value for name, value in config.items() if name != "ghn"}
    ghn, training_text = json.dumps(config["ghn"], indent=2), json.dumps(training, indent=2)
    project = "[timm-ghn](https://github.com/timm-ghn/timm-ghn)"
    return card.model_card(
        GHNConfig.from_dict(config["ghn"]),
        name="A graph hypernetwork for {classes} classes".format(**facts),
        license="apache-2.0",
        trained_on="{images:,} images of {size}×{size} pixels with {project}".format(**facts, project=project),
        source=card.DIRECTORY,
        details=_DETAILS.format(**{**config, **facts, "ghn": ghn, "training": training_text}),
    )
