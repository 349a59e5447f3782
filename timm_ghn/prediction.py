"""What was predicted for a model: tiles by name, what is kept and why; written into the model, or to files."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch
from torch import nn
from torch._subclasses import FakeTensor

from . import derived
from .ambient import plain_torch
from .errors import GHNError, PredictionError
from .files import safetensors_header
from .graph import ComputationGraph
from .tiling import tile_into


@dataclass
class Report:
    """What a prediction did to a model.

    Attributes:
        predicted: Names of the parameters that were predicted, with their number of elements.
        kept: Names of the parameters left alone, each with the reason.
        predicted_fraction: Share of the model's parameter elements that were predicted.
        seconds: Wall time per stage.
    """

    predicted: dict[str, int]
    kept: dict[str, str]
    predicted_fraction: float
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"predicted  {len(self.predicted)} parameters, {sum(self.predicted.values()):,} elements "
            f"({self.predicted_fraction:.2%})",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"kept       {names[0]}{more}: {reason}")
        lines.append("seconds    " + ", ".join(f"{stage} {taken:.3f}" for stage, taken in self.seconds.items()))
        return "\n".join(lines)


class Prediction(Mapping[str, torch.Tensor]):
    """Predicted parameters by name, each in the parameter's full shape; `.report` says what is not among them.

    Only the tiles are held; a full tensor is made when it is asked for, contiguous and in memory of its own.
    """

    def __init__(
        self,
        tiles: Mapping[str, torch.Tensor],
        shapes: Mapping[str, torch.Size],
        kept: Mapping[str, str],
        graph: ComputationGraph,
    ):
        """Takes tiles by name, the shapes of all of the model's parameters, and the reasons of those without tile."""
        self.tiles = dict(tiles)
        self.shapes = shapes
        self.graph = graph
        sizes = {name: shape.numel() for name, shape in shapes.items()}
        predicted = {name: size for name, size in sizes.items() if name in tiles}
        self.report = Report(
            predicted=predicted,
            kept={name: kept[name] for name in shapes if name not in tiles},
            predicted_fraction=sum(predicted.values()) / max(1, sum(sizes.values())),
        )

    def replaced(self, tensors: Mapping[str, torch.Tensor], kept: Mapping[str, str] | None = None) -> Prediction:
        """The same with other values for some parameters, and without those that are kept, for their reasons."""
        kept = {**self.report.kept, **(kept or {})}
        tiles = {name: tensor for name, tensor in self.tiles.items() if name not in kept}
        prediction = Prediction({**tiles, **tensors}, self.shapes, kept, self.graph)
        prediction.report.seconds = self.report.seconds
        return prediction

    def __getitem__(self, name: str) -> torch.Tensor:
        whole = self.tiles[name].new_empty(self.shapes[name])
        tile_into(whole, self.tiles[name])
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self.tiles  # without making the tensor, as Mapping does

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)


# ---- into a model ---------------------------------------------------------------------------------------------------


def unwritable(parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The parameters that values cannot be written into, each with the reason."""
    found: dict[str, str] = {}
    sharing: dict[tuple[int, int], list[str]] = {}
    for name, parameter in parameters.items():
        cls = type(parameter)
        if not issubclass(cls, FakeTensor) and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise PredictionError(
                f"{name} is a {cls.__name__}, which is not written to as tensors are; predict before the model is "
                "sharded or quantized."
            )
        if parameter.numel() == 0:
            found[name] = "empty"
        elif not parameter.is_floating_point():
            found[name] = f"{parameter.dtype}, while predictions are real floating-point numbers"
        elif parameter.layout is not torch.strided:
            found[name] = f"{parameter.layout}, while predictions are dense"
        elif _overlaps(parameter):
            found[name] = "an expanded view: its elements share memory"
        elif not parameter.is_meta:
            place = parameter.untyped_storage()._cdata, parameter.element_size()
            sharing.setdefault(place, []).append(name)
    for (_, size), names in sharing.items():
        if len(names) > 1:  # slices of one tensor, or a tie that is no tie between parameters
            taken = torch.zeros(parameters[names[0]].untyped_storage().nbytes() // size, dtype=torch.bool)
            for name in names:
                parameter = parameters[name]
                part = taken.as_strided(parameter.size(), parameter.stride(), parameter.storage_offset())
                if part.any():
                    found[name] = "shares memory with another parameter"
                part.fill_(True)
    return found


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor lie in the same place."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def check(name: str, tensor: torch.Tensor, parameter: nn.Parameter) -> None:
    trailing = parameter.shape[tensor.ndim :]
    if tensor.ndim > parameter.ndim or (tensor.ndim and trailing.numel() > 1) or tensor.numel() == 0:
        raise PredictionError(f"{name} has shape {tuple(parameter.shape)}, its prediction {tuple(tensor.shape)}.")
    if not torch.isfinite(tensor).all():
        raise PredictionError(f"The prediction for {name} is not finite; the GHN's weights are damaged or too large.")
    if parameter.dtype != tensor.dtype and not torch.isfinite(tensor.to(parameter.dtype).to(tensor.dtype)).all():
        raise PredictionError(f"The prediction for {name} is too large for {parameter.dtype}; use a wider type.")


@plain_torch()
def write(model: nn.Module, prediction: Prediction) -> None:
    """Writes a prediction into the model it was made for, and corrects its report by what cannot be written."""
    started = time.perf_counter()
    report = prediction.report
    parameters = dict(model.named_parameters())
    for name in list(report.predicted):
        if parameters[name].is_meta or isinstance(parameters[name], FakeTensor):
            report.kept[name] = "nothing was written: it is on the meta device, which holds no values"
            del report.predicted[name]
    with torch.no_grad():
        # First, since there may be no memory for them.
        tiles = {name: prediction.tiles[name].to(parameters[name].device) for name in report.predicted}
        copies = derived.copies(model, tiles)
        for name, tile_of_it in tiles.items():
            # What was made in inference mode can only be changed in it.
            with torch.inference_mode(parameters[name].is_inference()), torch.no_grad():
                tile_into(parameters[name], tile_of_it)
        for name in copies.keys() & dict(model.named_buffers()).keys():
            model.get_buffer(name).copy_(parameters[copies[name]])
        derived.refresh(model, tiles)
    sizes = [parameter.numel() for parameter in parameters.values()]
    report.predicted_fraction = sum(report.predicted.values()) / max(1, sum(sizes))
    report.seconds["assign"] = time.perf_counter() - started


# ---- to files -------------------------------------------------------------------------------------------------------


@plain_torch()
def write_files(
    model: nn.Module,
    prediction: Prediction,
    directory: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | None = None,
) -> list[Path]:
    """Writes a model with its predicted parameters as safetensors, one tensor after the other.

    Args:
        model: What the prediction was made for. Its predicted parameters are not looked at.
        prediction: The prediction.
        directory: An empty one, for ``model.safetensors``, or the shards and their index.
        dtype: Of everything that is floating point.
        max_shard_size: Bytes of tensors in a file, unless a single tensor has more; one file if None.

    Returns:
        The files.

    Raises:
        GHNError: If the disk has no room.
    """
    started = time.perf_counter()
    tiles = {id(parameter): prediction.tiles.get(key) for key, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    entries = {key: _Entry(key, tensor.detach(), dtype, tiles.get(id(tensor))) for key, tensor in state.items()}

    total, free = sum(entry.bytes for entry in entries.values()), shutil.disk_usage(directory).free
    if total > free:
        raise GHNError(f"The model takes {total:,} bytes, and the disk has room for {free:,}.")
    shards = huggingface_hub.split_state_dict_into_shards_factory(
        entries,
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size or total + 1,
    )
    files = [directory / name for name in shards.filename_to_tensors]
    for file in files:
        _write_safetensors(file, [entries[name] for name in shards.filename_to_tensors[file.name]])
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    prediction.report.seconds["write"] = time.perf_counter() - started
    return files


class _Entry:
    """A tensor of a file: how large it is, and how to make it."""

    def __init__(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, predicted: torch.Tensor | None):
        self.name = name
        self.shape = tensor.shape
        self.dtype = dtype if tensor.is_floating_point() else tensor.dtype
        self.bytes = tensor.numel() * self.dtype.itemsize
        self._tensor, self._predicted = tensor, predicted

    def make(self) -> torch.Tensor:
        if self._predicted is None:
            return self._tensor.to(self.dtype).contiguous()
        whole = torch.empty(self.shape, dtype=self.dtype)
        tile_into(whole, self._predicted)
        return whole


def _write_safetensors(file: Path, entries: list[_Entry]) -> None:
    """A safetensors file, of which one tensor is in memory at a time."""
    # Those of wide types first, so that each lies at a multiple of its own size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with file.open("wb") as stream:
        stream.write(safetensors_header((entry.name, entry.dtype, entry.shape) for entry in entries))
        for entry in entries:
            stream.write(entry.make().view(-1).view(torch.uint8).numpy().data)
