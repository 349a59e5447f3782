"""What a device is good at."""

from __future__ import annotations

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
