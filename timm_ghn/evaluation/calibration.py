"""Statistics from data for norms that keep them: predicted weights come without."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batches import check_images

logger = logging.getLogger("timm_ghn.evaluation")

# Running statistics before there are any.
START = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


def calibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Tensor, Tensor]]) -> nn.Module:
    """Gives norms with running statistics those of data; predicted weights come without.

    Batch norms, instance norms and timm's EvoNorms keep them. A running mean and variance become the average over the
    batches, by their sizes, each normalised by its own, deeper layers seeing what shallower ones make of it. A batch in
    which a norm sees a single value of each channel tells it nothing; the norm then uses what others have told it.
    Weights, modes and everything else stay as they are. A batch norm without running statistics normalises each batch
    by its own in evaluation too; there is nothing to calibrate, and a warning says so.

    Args:
        model: Any module; one without such norms is left alone.
        batches: Images, or tuples that start with them. They are moved to the model's device.

    Returns:
        The model.

    Raises:
        ValueError: If there are no batches, one is empty or not finite, all are too small for a norm, or a statistic
            comes out not finite; the model is then as it was.
    """
    norms = {name: module for name, module in model.named_modules() if has_statistics(module)}
    without = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in norms
    ]
    if without:
        names = ", ".join(name or type(model).__name__ for name in without[:3]) + (", …" if len(without) > 3 else "")
        logger.warning("no running statistics in %s: the output for an image depends on its whole batch", names)
    if not norms:
        return model
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms.values()}
    values = dict.fromkeys(norms.values(), 0)  # of a channel, that each has seen
    starved = set()

    def average(norm: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (entering, *_) = (*args, *kwargs.values())
        count = entering.numel() // entering.shape[1]
        norm.training = count > 1
        if count > 1:
            values[norm] += count
            norm.momentum = count / values[norm]  # the average over all values so far
        else:
            starved.add(norm)

    hooks = [norm.register_forward_pre_hook(average, with_kwargs=True) for norm in values]
    measured: set[nn.Module] = set()
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for norm in values:
                for name, value in START.items():
                    if name in before[norm]:
                        norm.get_buffer(name).fill_(value)
            seen = 0
            for batch in batches:
                images = batch[0] if isinstance(batch, Sequence) and batch else batch
                check_images(images)
                model(images.to(device_of(model)))
                seen += 1
        if not seen:
            raise ValueError("There are no batches to calibrate with; give at least one.")
        for name, norm in norms.items():
            if norm in starved and not values[norm]:
                raise ValueError(f"{name} sees one value of each channel in every batch; give more images in one.")
            if not all(norm.get_buffer(key).isfinite().all() for key in START if key in before[norm]):
                raise ValueError(f"The statistics of {name} are not finite: its input for these images is too large.")
        measured = {norm for norm in values if values[norm]}
    finally:
        for hook in hooks:
            hook.remove()
        for norm in values:
            norm.momentum = momenta[norm]
            for name, value in before[norm].items() if norm not in measured else ():
                norm.get_buffer(name).copy_(value)
    return model


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Gives every module its mode back, however the models' own `train` would have spread it."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def has_statistics(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor) and hasattr(module, "momentum")


def device_of(model: nn.Module) -> torch.device:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
