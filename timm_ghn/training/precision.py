"""Arithmetic that a device is fast at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_ghn.training.depthwise import FastDepthwise


@contextmanager
def fast_arithmetic(device: torch.device, bf16: bool, plain: bool = False) -> Iterator[None]:
    """While it is active, networks compute as the device is fast at.

    Args:
        device: What they compute on.
        bf16: Under bfloat16 autocast, but for what a CPU is slow at in it.
        plain: There are neither depthwise convolutions nor attention, for which all functions would pay.
    """
    special = nullcontext() if plain or device.type != "cpu" else _SlowInBfloat16() if bf16 else FastDepthwise()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), special:
        yield


class _SlowInBfloat16(FastDepthwise):
    """Keeps depthwise convolutions and attention in float32: backward in bfloat16, they take a CPU twice as long."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        depthwise = func is F.conv2d and args[1].shape[1] == 1 and args[1].shape[0] > 1
        if not depthwise and func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        args = tuple(map(_as_float32, args))
        kwargs = {key: _as_float32(arg) for key, arg in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return super().__torch_function__(func, types, args, kwargs).bfloat16()  # type: ignore[no-untyped-call]


def _as_float32(argument: object) -> object:
    return argument.float() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
