"""From a module to its graph: a copy on the meta device, one forward pass of it, and the contraction of that."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..ambient import plain_torch
from ..errors import TraceError
from .computation_graph import ComputationGraph
from .contract import contract
from .meta_copy import meta_copy
from .record import Run, Size, Tape, input_candidates, run_on_meta


@plain_torch()
def trace(model: nn.Module, input_size: int | Size | None = None, inputs: Any = None) -> ComputationGraph:
    """Traces a model into the graph a GHN reads, on the meta device: no arithmetic and no memory for weights.

    The model itself is only read; it may be on any device, in any mode and dtype. It is a copy that runs, and neither
    the model's forward hooks nor the global ones run with it.

    Args:
        model: Any eager module.
        input_size: Input size without the batch dimension, e.g. ``(3, 224, 224)``, or a side length for RGB images. By
            default what timm was told (``img_size``, ``in_chans``) or the model declares, else ``(3, 224, 224)``.
        inputs: What the forward pass takes, for models that one image cannot drive: a tensor, a tuple or list of its
            positional arguments, or a dictionary of its keyword arguments, with the batch dimension. Only the shapes of
            tensors are used, and whether they are floating-point.

    Raises:
        TraceError: If the model is scripted, lazy or cannot be copied, or its forward pass fails.
        TypeError: If `model` is no module.
        ValueError: If `input_size` is no size, or `inputs` are given beside it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} is no model: pass a module, such as timm.create_model makes from a name.")
    if inputs is not None and input_size is not None:
        raise ValueError("Pass input_size or inputs, not both.")
    candidates = [torch.empty(1, *size, device="meta") for size in input_candidates(model, input_size)]
    duplicate = meta_copy(model)
    originals = [*model.parameters(), *model.buffers()]
    failure: Exception | None = None
    for arguments in candidates if inputs is None else [inputs]:
        try:
            run = _run(duplicate, arguments, originals)
        except TraceError:
            raise
        except Exception as error:  # whatever a user's forward raises
            failure = failure or error
            continue
        if not run.outputs:
            raise TraceError(
                f"{type(model).__name__} returned nothing that autograd traces to its parameters: its output must not "
                "be detached or computed under no_grad."
            )
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return contract(Tape(duplicate, run), frozen)
    assert failure is not None
    what = "the given inputs" if inputs is not None else f"an input of size {tuple(candidates[0].shape[1:])}"
    raise TraceError(
        f"{type(model).__name__} fails on {what} ({type(failure).__name__}: {failure}); {_remedy(duplicate, failure)}."
    ) from failure


def _run(model: nn.Module, inputs: Any, originals: list[torch.Tensor]) -> Run:
    try:
        return run_on_meta(model, inputs, originals)
    except RuntimeError as error:
        if not _mixes_devices(error):
            raise
    with torch.device("meta"):  # for tensors that are made on the default device
        return run_on_meta(model, inputs, originals)


def _mixes_devices(error: Exception) -> bool:
    return any(text in str(error) for text in ("on the same device", "expected device"))


def _remedy(model: nn.Module, failure: Exception) -> str:
    """What to do about a forward pass that failed."""
    text = str(failure).lower()
    if "meta tensor" in text or "meta device" in text or "register_meta" in text:
        return (
            "its forward pass looks at values, as detectors do, and a trace has only shapes: pass the submodule that "
            "takes the image, such as its backbone"
        )
    if _mixes_devices(failure):
        return (
            "its forward pass makes tensors on a device of its own: make them on its input's, or pass the submodule "
            "that takes the image"
        )
    arguments = inspect.signature(model.forward).parameters
    required = [name for name, a in arguments.items() if a.default is a.empty and not a.kind.name.startswith("VAR_")]
    if len(required) > 1:
        return f"its forward pass takes ({', '.join(required)}): pass examples of them as inputs"
    return "pass the size it expects as input_size, or what its forward pass takes as inputs"
