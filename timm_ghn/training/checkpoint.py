"""Training state on disk: written whole or not at all, and nothing in it that could run code."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_ghn.errors import GHNError
from timm_ghn.files import remove_unfinished, whole_directory, whole_files
from timm_ghn.hypernet import GHN

logger = logging.getLogger("timm_ghn.training")

_PREFIX = "step-"


class TrainingError(GHNError):
    """Training cannot start, resume, go on, or write what it has to."""


def save_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Writes a checkpoint next to the last one and then removes that.

    Renaming the finished directory is what makes it one, so a save that is interrupted, by whatever, leaves the last
    checkpoint in place and nothing that could be mistaken for a new one.

    Args:
        folder: Where checkpoints are; made if it does not exist.
        step: Number of the next step; of several checkpoints, the one with the largest is the valid one.
        tensors: Safetensors files to write, by name without suffix.
        state: What goes to ``state.json``.

    Raises:
        TrainingError: If it cannot be written, because the disk is full, say.
    """
    earlier = _checkpoints(folder)
    target = folder / f"{_PREFIX}{step:09d}"
    if target in earlier:
        return
    intact = f"the checkpoint of step {_step(earlier[-1])} is intact" if earlier else "there is no earlier checkpoint"
    try:
        remove_unfinished(folder)
        with whole_directory(target) as unfinished:
            for name, values in tensors.items():
                contiguous = {key: value.contiguous() for key, value in values.items()}
                save_file(contiguous, unfinished / f"{name}.safetensors")
            (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"Cannot write a checkpoint to {folder} ({error}); {intact}: make room and resume."
        ) from error
    for directory in earlier:
        shutil.rmtree(directory, ignore_errors=True)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The newest checkpoint of a folder: the tensors and the state that `save_checkpoint` got.

    Raises:
        TrainingError: If there is none, or it is damaged.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        raise TrainingError(f"{folder} holds no checkpoint to resume from; start without resuming.")
    directory = checkpoints[-1]
    try:
        # Copies, since optimizers keep the tensors that they are given, and these are the file in memory.
        tensors = {
            file.stem: {name: tensor.clone() for name, tensor in load_file(file).items()}
            for file in sorted(directory.glob("*.safetensors"))
        }
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainingError(
            f"The checkpoint {directory} is damaged ({error}); remove it and start again from the exported weights."
        ) from error
    return tensors, state


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one to resume from."""
    return bool(_checkpoints(folder))


def export(directory: Path, ghn: GHN, card: str) -> None:
    """Writes ``model.safetensors``, ``config.json`` and ``README.md``, replacing each in one go.

    Raises:
        TrainingError: If they cannot be written.
    """
    try:
        remove_unfinished(directory)
        with whole_files(directory) as unfinished:
            (unfinished / "README.md").write_text(card, encoding="utf-8")  # otherwise the Hub's mixin writes its own
            ghn.save_pretrained(unfinished)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"Cannot export the GHN to {directory} ({error}); make room and resume.") from error


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(directory for directory in folder.glob(f"{_PREFIX}*") if directory.is_dir())


def _step(directory: Path) -> int:
    return int(directory.name.removeprefix(_PREFIX))
