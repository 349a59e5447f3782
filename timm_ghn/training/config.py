"""What a training run computes, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from timm_ghn.hypernet import GHNConfig
from timm_ghn.training.checkpoint import TrainingError
from timm_ghn.training.objectives import OBJECTIVES
from timm_ghn.training.optimizers import OPTIMIZERS
from timm_ghn.training.pool import Share

SCHEDULES = ("cosine", "steps", "constant", "linear")
_TUPLES = ("betas", "image_sizes", "data_weights", "ways")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a run computes, and nothing else: a checkpoint resumes under the same config only.

    Attributes:
        ghn: The GHN to train.
        architectures: The mixture of architectures to train on.
        steps: Length of the run; None for one as long as its time, where the clock drives the learning rate.
        seed: Decides the GHN's first weights, the architectures, and each step's images.
        meta_batch: Architectures a step, over all processes.
        batch_size: Images for each of them.
        optimizer: "soap", "adamw" or "adam".
        lr: Peak learning rate.
        betas: Of the optimizer.
        weight_decay: Of the optimizer.
        warmup: Steps in which the learning rate rises to its peak.
        schedule: Of the learning rate: "cosine" to a hundredth of the peak; "steps": a tenth after 2/3 of the run and
            again after 5/6; "constant", for runs of unknown length; "linear" to 0, as a constant one is cooled down.
        network_clip: Upper limit for the norm of each network's gradient with respect to what was predicted for it;
            None for none. Norms differ from kind to kind (2 for a residual network, 24 for a transformer, 120 for one
            in ten of those), and without it the largest alone decides the step.
        clip: Upper limit for the norm of the GHN's gradient.
        head: "predicted", for the classes of one data set, or "ridge": fitted in closed form to some images of a few
            classes of any of several data sets, and judged by others of theirs. A batch is half of each.
        data_weights: How often a task is one of each of the data sets, relative to the others; empty for equally.
        ways: One of these is a task's number of classes.
        grey: Share of the tasks that are without colour.
        blind: Share of the tasks that a conditioned GHN is not told of.
        label_smoothing: Of the cross-entropy, with a predicted head.
        teacher: Share of the divergence from a teacher's labels in the loss, 0 for none, see `soft_labels`; the rest is
            the cross-entropy's.
        temperature: At which the divergence compares.
        image_sizes: One of these is drawn for each network and step, and its images are brought to that size; empty
            for the data set's own, which networks of one fixed size always get.
        penalty: Weight of the summed norms of the predicted parameters in the loss (arXiv 2303.04143, §3.3).
        ema: Decay of the averaged weights, which are what is validated and exported; 0 for none.
        uses: How often an architecture is trained on, see `Schedule`.
        spacing: Rounds between its uses, see `Schedule`.
        bf16: Run the predicted networks under bfloat16 autocast.
        eval_every: Steps between validations, each followed by a checkpoint.
        val_architectures: Unseen architectures to validate on, of the same mixture.
        val_images: Images to validate on.
        max_skipped: Networks without a finite gradient, which are left out, that are tolerated in 1,000 steps.
    """

    ghn: GHNConfig
    architectures: tuple[Share, ...] = (Share(),)
    steps: int | None = None
    seed: int = 0
    meta_batch: int = 4
    batch_size: int = 64
    optimizer: str = "soap"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.95, 0.95)
    weight_decay: float = 1e-2
    warmup: int = 200
    schedule: str = "cosine"
    network_clip: float | None = 3.0
    clip: float = 5.0
    head: str = "predicted"
    data_weights: tuple[float, ...] = ()
    ways: tuple[int, ...] = (5, 10)
    grey: float = 0.0
    blind: float = 0.2
    label_smoothing: float = 0.05
    teacher: float = 0.0
    temperature: float = 2.0
    image_sizes: tuple[int, ...] = ()
    penalty: float = 0.0
    ema: float = 0.998
    uses: int = 6
    spacing: int = 20
    bf16: bool = False
    eval_every: int = 1000
    val_architectures: int = 24
    val_images: int = 1000
    max_skipped: int = 50

    def __post_init__(self) -> None:
        def require(condition: bool, problem: str) -> None:
            if not condition:
                raise TrainingError(f"Training config: {problem}.")

        for name in ("meta_batch", "batch_size", "uses", "spacing", "eval_every", "val_architectures", "val_images"):
            require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "clip", "network_clip", "temperature"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be above 0")
        require(self.steps is None or self.steps > 0, f"steps is {self.steps}; it must be at least 1, or null")
        for name, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("head", OBJECTIVES)):
            value = getattr(self, name)
            require(value in allowed, f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        require(0 <= self.ema < 1, f"ema is {self.ema}; it must be from 0 to below 1")
        for name in ("teacher", "grey", "blind"):
            share = getattr(self, name)
            require(0 <= share <= 1, f"{name} is {share}; it must be from 0 to 1")
        require(
            all(weight > 0 for weight in self.data_weights), f"data_weights is {self.data_weights}; all must be above 0"
        )
        require(min(self.ways, default=0) > 1, f"ways is {list(self.ways)}; tasks must have at least 2 classes")
        sizes = self.image_sizes
        require(all(size > 0 for size in sizes), f"image_sizes is {list(sizes)}; each must be at least 1")
        first = [share for share in self.architectures if share.from_step == 0 and share.weight > 0]
        require(bool(first), "no share of the architectures has a weight above 0 and starts at step 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        shares = [{**dataclasses.asdict(share), "families": list(share.families)} for share in self.architectures]
        plain = {**dataclasses.asdict(self), "ghn": self.ghn.to_dict(), "architectures": shares}
        return {**plain, **{name: list(getattr(self, name)) for name in _TUPLES}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; keys that are missing take their defaults.

        Raises:
            TrainingError: If a key is unknown or a value is out of range.
        """
        data = dict(data)
        try:
            data["ghn"] = GHNConfig.from_dict(data["ghn"])
            if "architectures" in data:
                shares = ({**share, "families": tuple(share.get("families", ()))} for share in data["architectures"])
                data["architectures"] = tuple(Share(**share) for share in shares)
            for name in data.keys() & set(_TUPLES):
                data[name] = tuple(data[name])
            return cls(**data)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TrainingError(f"This is not a training config ({error}); see TrainConfig for its fields.") from error


PRESETS: dict[str, dict[str, Any]] = {
    # The defaults of `TrainConfig`: many small steps.
    "ghn2": {"ghn": {"bounded": True}},
    "ghn3": {"ghn": {"hypernet": "graphormer", "hid": 64, "layers": 3, "bounded": True}, "penalty": 3e-5},
    # The recipe of arXiv 2110.13100, appendix B: the baseline.
    "published": {
        "meta_batch": 8, "optimizer": "adam", "lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0, "warmup": 0,
        "schedule": "steps", "network_clip": None, "label_smoothing": 0.0, "ema": 0.0, "uses": 1,
    },
}  # fmt: skip
"""Named differences from the defaults of `TrainConfig`."""
