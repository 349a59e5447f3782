"""torch as it is by itself, whatever the program around us has told it.

Much of torch's state reaches into every function that is called meanwhile: autocast, the default dtype and device, the
precision of products, modes that see or change each call. A user sets it for the model that is made or trained; what
a GHN predicts must not depend on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """While active, torch computes as in a program that has set nothing; also a decorator.

    Off are autocast, inference mode and no_grad, anomaly detection, hooks on saved tensors, and the modes of others,
    among them the default device. The default dtype is float32, and float32 products are float32 throughout. The
    choice of deterministic algorithms is left alone, since it is no other value. Two of these settings, default dtype
    and precision, are the process's, not the thread's; they are touched only where they differ.
    """
    with contextlib.ExitStack() as stack:
        for mode in reversed(_get_current_function_mode_stack()):
            _pop_mode()
            stack.callback(_push_mode, mode)
        if _get_current_dispatch_mode_stack():
            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        accelerator = torch.accelerator.current_accelerator()
        for device in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch._C._autograd._top_saved_tensors_default_hooks(True):
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        for products in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            if (precision := products.fp32_precision) not in ("none", "ieee"):
                products.fp32_precision = "none"
                inherited = products.fp32_precision == precision  # from a wider setting, as it is to be again
                products.fp32_precision = "ieee"
                stack.callback(setattr, products, "fp32_precision", "none" if inherited else precision)
        yield


def _same(tensor: Any) -> Any:
    return tensor
