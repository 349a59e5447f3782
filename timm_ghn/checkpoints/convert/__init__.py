"""The official checkpoints, which are pickles, made into safetensors without executing anything in them."""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from pathlib import Path

from ...errors import CheckpointError
from ...files import whole_files
from ...hypernet import GHN
from .files import read
from .layout import config_and_state

__all__ = ["convert_file"]

logger = logging.getLogger("timm_ghn.convert")


def convert_file(path: str | os.PathLike[str], out_dir: str | os.PathLike[str]) -> Path:
    """Converts a published GHN checkpoint to ``model.safetensors`` and ``config.json``.

    Reads what ``torch.save`` wrote for GHN-1, GHN-2 and the MLP baseline (arXiv 2110.13100), and the state dicts of
    GHN-3 (arXiv 2303.04143) that joblib wrote, plain or compressed by zlib. No code in the file is executed.

    Args:
        path: The checkpoint.
        out_dir: Where the two files go; made if it does not exist.

    Returns:
        `out_dir`, which `timm_ghn.load_ghn` takes.

    Raises:
        CheckpointError: If the file is not such a checkpoint, is damaged, or holds anything but tensors.
    """
    path, out_dir = Path(path), Path(out_dir)
    try:
        content, size = read(path)
        config, state = config_and_state(content, size)
    # A malformed file can break an assumption anywhere in the readers, and all of it means the same to the user.
    except Exception as error:
        told = isinstance(error, ValueError | OSError | zipfile.BadZipFile | zlib.error)
        reason = str(error) if told else f"it is malformed ({type(error).__name__})"
        raise CheckpointError(f"Cannot convert {path}: {' '.join(reason.split())}.") from error
    with whole_files(out_dir) as unfinished:
        GHN.of(config, state)._save_pretrained(unfinished)
    logger.info("converted %s to %s: %s", path, out_dir, config)
    return out_dir
