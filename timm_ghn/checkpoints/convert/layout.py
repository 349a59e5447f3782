"""From what a published file holds to a config and the tensors that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...hypernet import GHN, GHNConfig
from ...hypernet.decoders import DECODERS, Decoder
from ...hypernet.message_passing import HYPERNETS, MessagePassing
from .pickles import of

_EMBEDDINGS = tuple(name for kind in HYPERNETS.values() for name in kind.node_embeddings)


def config_and_state(content: Any, size: int) -> tuple[GHNConfig, dict[str, torch.Tensor]]:
    """The config of a checkpoint and its tensors, named and shaped as `GHN` has them.

    Args:
        content: A state dict, or a dictionary with ``state_dict`` and perhaps ``config``.
        size: Bytes in the file: its tensors cannot have more.

    Raises:
        ValueError: If it is not a GHN's, or its config contradicts its tensors.
    """
    if not isinstance(content, Mapping):
        raise ValueError("it does not hold a state dict")
    state, stated = (content["state_dict"], content.get("config", {})) if "state_dict" in content else (content, {})
    if not isinstance(state, Mapping) or not isinstance(stated, Mapping):
        raise ValueError("its state_dict and config are not dictionaries")
    tensors = {_name(name): tensor for name, tensor in state.items() if _is_parameter(name, tensor)}
    if sum(tensor.nbytes for tensor in tensors.values()) > size:
        raise ValueError("its tensors share memory, which a GHN's never do")
    config = _config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, stated)

    expected = GHN.parameter_shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in expected or name not in tensors:
            raise ValueError(f"{name} {'does not belong there' if name in tensors else 'is missing'}")
        shape, wanted = tuple(tensors[name].shape), expected[name]
        # A map over channels is a matrix or a 1x1 kernel, depending on which of the published programs wrote it.
        if _without_ones(shape) != _without_ones(wanted):
            raise ValueError(f"{name} has shape {shape}, its config asks for {wanted}")
    return config, {name: tensors[name].reshape(shape).float() for name, shape in expected.items()}


def _name(name: str) -> str:
    """GHN-3's program moves its embeddings of nodes into the first layer when it loads a GHN, and saves them there."""
    return next((embed + name.split(embed)[1] for embed in _EMBEDDINGS if name.startswith(f"gnn.0.{embed}.")), name)


def _is_parameter(name: Any, tensor: Any) -> bool:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        raise ValueError(f"its entry {str(name)[:80]!r} is not a floating-point tensor")
    return True


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


def _config(shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, Any]) -> GHNConfig:
    """The config that the tensors imply, with what they do not show taken from the stated one or the papers."""
    try:
        implied = _implied(shapes)
    except KeyError as error:
        raise ValueError(f"it is not a GHN's: it has no {error}") from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError("it is not a GHN's: its tensors have other shapes") from error
    stated = {of(str, name): _plain(value) for name, value in stated.items()}
    if stated.pop("is_ghn2", None) is not None:
        stated.pop("hypernet", None)  # GHN-3's program ignores the key and leaves it at its default
    foreign = {name for kind in HYPERNETS.values() for name in kind.own_fields}
    foreign -= set(HYPERNETS[implied["hypernet"]].own_fields)
    stated = {name: value for name, value in stated.items() if name not in foreign}
    for name in implied.keys() & stated.keys():
        if stated[name] != implied[name]:
            raise ValueError(f"its config says {name}={stated[name]}, its tensors say {implied[name]}")
    # GHN-1 has neither layer norm nor weight normalisation, GHN-2 and GHN-3 have both; one of them does not show.
    defaults = {"weight_norm": implied["layernorm"], "ve": True}
    return GHNConfig.from_dict({**defaults, **stated, **implied})


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(of(int, size) for size in value[:8])
    return of((bool, int, float, str, None.__class__), value)


def _implied(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    hid, (classes, _) = shapes["embed.weight"][1], shapes["bias_class.1.weight"]
    config = {"hid": hid, "num_classes": classes, "layernorm": "ln.weight" in shapes}
    hypernet, by_hypernet = _first_with(HYPERNETS, "gnn", shapes)
    decoder, by_decoder = _first_with(DECODERS, "decoder", shapes)
    return {**config, "hypernet": hypernet, **by_hypernet, "decoder": decoder, **by_decoder}


def _first_with(
    kinds: Mapping[str, type[MessagePassing] | type[Decoder]], part: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, Any]]:
    """The kind of a part of a GHN whose tensors are there, and what they say of the config."""
    found = ((name, kind.implied(shapes)) for name, kind in kinds.items())
    for name, implied in found:
        if implied is not None:
            return name, implied
    raise KeyError(part)
