"""Optimisers by name, and their state as tensors for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from timm_ghn.training.checkpoint import TrainingError

OPTIMIZERS = ("soap", "adamw", "adam")

# A side that is longer than this keeps its own basis, for whose change there would be more to compute than is learnt.
_PRECONDITIONED_SIZE = 512
_STEPS_A_BASIS = 25


def new_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimiser for parameters that have their gradients already.

    Args:
        name: One of `OPTIMIZERS`; ``"soap"`` is Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).
        parameters: Pointwise kernels among them are optimised as the matrices that they are.
        lr: Learning rate.
        betas: Decay of the first and second moments.
        weight_decay: Decoupled for all but ``"adam"``.

    Raises:
        TrainingError: If the library that has it is missing.
    """
    if name != "soap":
        kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
        return kind(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise TrainingError('The optimizer "soap" needs pytorch_optimizer: pip install "timm-ghn[train]".') from error

    class ExactSOAP(SOAP):
        """Keeps each basis in the one layout that a checkpoint has, so that resuming gives the same bits."""

        def update_pre_conditioner(self, grad: Tensor, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            super().update_pre_conditioner(grad, state, *args, **kwargs)
            state["Q"] = [basis.contiguous() if len(basis) else basis for basis in state["Q"]]

    return ExactSOAP(
        [_as_matrix(parameter) for parameter in parameters],
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        precondition_frequency=_STEPS_A_BASIS,
        max_precondition_dim=_PRECONDITIONED_SIZE,
    )


def _as_matrix(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or a matrix in the same memory if it is a pointwise kernel."""
    if parameter.ndim < 3 or parameter[0, 0].numel() > 1 or parameter.grad is None:
        return parameter
    matrix = nn.Parameter(parameter.detach().flatten(1))
    matrix.grad = parameter.grad.flatten(1)
    return matrix


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimiser's state as tensors, ``parameter/entry`` or ``parameter/entry/place`` where an entry is a list.

    Args:
        optimizer: With one group of parameters.
        names: Of the parameters, in the optimiser's order.
    """
    (group,) = optimizer.param_groups
    tensors = {"step": torch.tensor(group.get("step", 0))}
    for name, parameter in zip(names, group["params"], strict=True):
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, list):
                # Where SOAP has no matrix, it has an empty list, and takes a tensor without elements as well.
                tensors.update({f"{name}/{key}/{i}": torch.as_tensor(item) for i, item in enumerate(value)})
            else:
                # A number of Python's has twice the digits of torch's default.
                exact = torch.float64 if isinstance(value, float) else None
                tensors[f"{name}/{key}"] = torch.as_tensor(value, dtype=exact)
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        KeyError: If there is state for a parameter that the optimiser does not have.
    """
    (group,) = optimizer.param_groups
    parameters = dict(zip(names, group["params"], strict=True))
    if "step" in group or int(tensors["step"]):
        group["step"] = int(tensors["step"])
    for key, tensor in sorted(tensors.items()):  # so that the items of a list come in their order
        name, *entry = key.split("/")
        if not entry:
            continue
        state = optimizer.state[parameters[name]]
        value: Any = tensor.to(parameters[name].device) if tensor.ndim or entry[0] == "step" else tensor.item()
        if len(entry) == 2:
            state.setdefault(entry[0], []).append(value)
        else:
            state[entry[0]] = value
