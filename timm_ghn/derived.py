"""What follows from a parameter: the weight that is computed from it, and state that was computed from it.

A layer may compute its weight: weight norm from a magnitude and a direction, spectral norm with vectors that follow the
weight while it is trained. What is predicted is such a layer's weight, as far as the layer allows it, and nothing that
was computed from the old weight may outlive that.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def solve(model: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Finds what parameters have to be for the weights computed from them to be the predicted ones.

    Args:
        model: What the prediction is for; only read.
        weights: Predicted tensors by the name of the parameter that stands for the weight, in its shape.

    Returns:
        Tensors for parameters that cannot simply be the weight, and the reasons of those that are better left alone.
    """
    solved: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ParametrizationList):
            inputs = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
            steps = {f"{prefix}.{name}" for name, _ in module.named_parameters()} - set(inputs)
            refused |= dict.fromkeys(steps & weights.keys(), "parameter of a parametrization")
            predicted = [name for name in inputs if name in weights]
            if not predicted:
                continue
            weight = weights[max(predicted, key=lambda name: model.get_parameter(name).numel())]
            found = _right_inverse(module, weight)
            if found is None:
                kind = " and ".join(dict.fromkeys(type(step).__name__ for step in module.children()))
                refused |= dict.fromkeys(predicted, f"its parametrization, {kind}, cannot take on a given weight")
            elif [tensor.shape for tensor in found] == [model.get_parameter(name).shape for name in inputs]:
                solved |= {name: tensor for name, tensor in zip(inputs, found, strict=True) if tensor is not weight}
        for hook in _weight_hooks(module):
            if isinstance(hook, WeightNorm):
                magnitude, direction = (f"{prefix}.{hook.name}_{part}".removeprefix(".") for part in "gv")
                if direction in weights:
                    solved[magnitude] = torch.norm_except_dim(weights[direction], 2, hook.dim)
    frozen = {name for name in solved if not model.get_parameter(name).requires_grad}
    return {name: tensor for name, tensor in solved.items() if name not in frozen}, refused


def _right_inverse(parametrization: ParametrizationList, weight: Tensor) -> list[Tensor] | None:
    """What the parametrization has to be given for this weight; None if there is no such thing, its state as it is."""
    twin = copy.deepcopy(parametrization)
    state = [(id(buffer), buffer._version) for buffer in twin.buffers()]
    found: Tensor | tuple[Tensor, ...] = weight
    step: Any
    for step in reversed(twin):
        try:
            found = step.right_inverse(found) if hasattr(step, "right_inverse") else found
        except NotImplementedError:  # as without one, it counts as the identity, which is torch's convention
            pass
        except Exception:  # whatever it says of a weight it was not made for
            return None
    if state != [(id(buffer), buffer._version) for buffer in twin.buffers()]:
        return None
    return [found] if isinstance(found, Tensor) else list(found)


def _weight_hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm | BasePruningMethod]:
    """torch's hooks that compute a weight before each forward pass."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
            yield hook


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at, one by one."""
    is_real = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return is_real and tensor.layout is torch.strided and tensor.numel() > 0


def is_zero(parameter: torch.Tensor) -> bool:
    """Whether all of a parameter's values are zero, as far as it has values."""
    if not has_values(parameter):
        return False
    return not parameter[(0,) * parameter.ndim].item() and not parameter.any().item()


def copies(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Tensors with the values of a parameter, as a momentum encoder starts from; constants are nobody's copy.

    Args:
        model: Only read.
        names: Parameters to find copies of.

    Returns:
        Names of other parameters and of buffers, each with the name of the parameter it is a copy of.
    """

    def ends(tensor: Tensor) -> tuple[float, float] | None:
        """First and last value, unless they are the same as in a constant."""
        if not has_values(tensor) or not tensor.is_floating_point():
            return None
        first, last = tensor[(0,) * tensor.ndim].item(), tensor[(-1,) * tensor.ndim].item()
        return None if first == last else (first, last)

    parameters = dict(model.named_parameters())
    others: dict[torch.Size, list[tuple[str, Tensor, tuple[float, float]]]] = defaultdict(list)
    for name, tensor in itertools.chain(parameters.items(), model.named_buffers()):
        if name not in names and (values := ends(tensor)):
            others[tensor.shape].append((name, tensor, values))
    found: dict[str, str] = {}
    for source in names:
        parameter = parameters[source]
        values = ends(parameter) if parameter.shape in others else None
        for name, tensor, other in others[parameter.shape] if values else ():
            if other == values and torch.equal(tensor, parameter.to(tensor)):
                found[name] = source
    return found


def refresh(model: nn.Module, written: Collection[str]) -> None:
    """Brings up to date what a model computed from the old values of the parameters that were written."""
    owners = {name.rpartition(".")[0] for name in written}
    for prefix, module in model.named_modules():
        if prefix not in owners:
            continue
        if isinstance(module, ParametrizationList) and next(module.buffers(), None) is not None:
            _settle(module, module)
        for hook in _weight_hooks(module):
            _settle(module, lambda hook=hook, module=module: _hooked(hook, module))  # type: ignore[misc]
        if hasattr(module, "weight_fake_quant"):
            _observe(module)
        if hasattr(module, "attention_bias_cache"):  # what some of timm's modules look up in a table once, in eval mode
            module.attention_bias_cache = {}
    torch.clear_autocast_cache()


def _hooked(hook: WeightNorm | SpectralNorm | BasePruningMethod, module: nn.Module) -> Tensor:
    hook(module, ())
    weight: Tensor = getattr(module, hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name)
    return weight


def _settle(module: nn.Module, weight: Callable[[], Tensor]) -> None:
    """Computes a weight as in training, when its state follows it, until it no longer changes."""
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = True
    found = weight()
    for _ in range(200):
        last, found = found, weight()
        if torch.linalg.vector_norm(found - last) <= 1e-6 * torch.linalg.vector_norm(found):
            break
    for part, training in modes.items():
        part.training = training


def _observe(module: nn.Module) -> None:
    """Lets a quantiser of the weight forget the range it saw, and see the new one where that is the weight's own."""
    quantizer: Any = module.weight_fake_quant
    observer: Any = getattr(quantizer, "activation_post_process", None)
    if hasattr(observer, "reset_min_max_vals"):
        observer.reset_min_max_vals()
        if not hasattr(module, "bn"):  # else the weight is multiplied by a norm's first
            enabled = quantizer.observer_enabled.clone()
            quantizer.enable_observer()
            quantizer(module.weight)
            quantizer.observer_enabled.copy_(enabled)
