"""One architecture as a training task: its graph, and the network run with whatever parameters a GHN predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from timm_ghn.graph import ComputationGraph, trace
from timm_ghn.tiling import tile
from timm_ghn.training.architectures import Architecture
from timm_ghn.training.folding import fold, fold_constant, unfold
from timm_ghn.training.precision import fast_arithmetic
from timm_ghn.training.small_maps import simplify_small_maps

_DECLARED_SIZE = 224


@dataclass(frozen=True)
class Prepared:
    """What takes time to find out about an architecture, found out ahead by a worker process.

    Attributes:
        architecture: The network's description.
        graph: Its computation graph.
        fixed: Values of the parameters that no GHN predicts and of the buffers, by name; statistics of batch norms are
            not among them.
    """

    architecture: Architecture
    graph: ComputationGraph
    fixed: dict[str, Tensor]


def prepare(architecture: Architecture, num_classes: int, image_size: int) -> Prepared:
    """Traces an architecture; a pure function of its arguments."""
    skeleton = architecture.skeleton(num_classes, image_size=image_size)
    # As a user's model of this kind will be: at the size that timm's models declare, unless it is fixed. On small
    # images the last maps can be a single position, where an average over positions cannot be told from a reshape.
    size = image_size if architecture.fixed_size else _DECLARED_SIZE
    graph = trace(skeleton, (3, size, size))
    statistics = {id(buffer) for module in _batch_norms(skeleton) for buffer in module.buffers(recurse=False)}
    needed = {name for name, buffer in skeleton.named_buffers() if id(buffer) not in statistics} | graph.kept.keys()
    fixed = {}
    if needed:
        # A skeleton has no values; those of the real network depend on nothing but its description.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(architecture.key[:15], 16))
            network = architecture.build(num_classes, image_size=image_size)
        values = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        fixed = {name: values[name].detach() for name in sorted(needed)}
    return Prepared(architecture, graph, fixed)


class Task:
    """A network without parameters of its own: the module lives on the meta device, its values come with every call.

    Batch norms use the statistics of their batch, so that there is nothing to keep between calls. Without its head, it
    gives what would enter the classifier.

    Attributes:
        architecture: The network's description.
        graph: What the GHN reads.
        shapes: Names and shapes of the network's parameters.
    """

    def __init__(
        self,
        prepared: Prepared,
        num_classes: int,
        image_size: int,
        device: torch.device | str = "cpu",
        headless: bool = False,
    ):
        self.architecture = prepared.architecture
        self.graph = prepared.graph
        self.device = torch.device(device)
        # A tensor from a worker process holds an open file for as long as it lives; copies do not.
        self.fixed = {name: value.to(device, copy=True) for name, value in prepared.fixed.items()}
        if self.device.type == "cpu":
            self.fixed = {name: fold_constant(value) for name, value in self.fixed.items()}
        self.module = self.architecture.skeleton(num_classes, image_size=image_size).train()
        for module in _batch_norms(self.module):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        for child in self.module.modules():
            if isinstance(child, nn.Conv2d) and child.in_channels < 8 and _skips_positions(child):
                _subsample_first(child)
        if self.device.type == "cpu":
            simplify_small_maps(self.module)
        if headless:
            for name in {name.rpartition(".")[0] for name in self.graph.head}:
                self.module.set_submodule(name, nn.Identity())
        self.shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        self._plain = not self.graph.has_depthwise and "msa" not in self.graph.ops

    def parameters(self, tiles: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the GHN predicted, in the parameters' full shapes; differentiable."""
        # Arithmetic is what takes time on a CPU; on a GPU, small networks wait for launches, which folding adds to.
        whole = fold if self.device.type == "cpu" else tile
        return {name: whole(tiles[name], shape) for name, shape in self.shapes.items() if name in tiles}

    def output(self, parameters: Mapping[str, Tensor], images: Tensor, bf16: bool = False) -> Tensor:
        """Logits or features of the network with these parameters, float32 [n, ·].

        Args:
            parameters: By name.
            images: float32 [n, 3, size, size].
            bf16: Compute under bfloat16 autocast.
        """
        # Convolutions of this layout are faster on both devices, and it passes from layer to layer.
        images = images.contiguous(memory_format=torch.channels_last)
        with fast_arithmetic(self.device, bf16, self._plain):
            output: Tensor = functional_call(self.module, {**self.fixed, **parameters}, (images,))
        return unfold(output).float()


def _skips_positions(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is pointwise and strided, without padding whose positions would count."""
    return convolution.kernel_size == (1, 1) != convolution.stride and convolution.padding == (0, 0)


def _subsample_first(convolution: nn.Conv2d) -> None:
    """Makes a pointwise convolution skip positions before it computes, not while it does.

    It is the same, but oneDNN (as in torch 2.14) writes past the end of its buffer in the weight's gradient of such a
    layer, where a processor has AVX2 and no AVX-512, the layout is channels-last, and the channels are fewer than 8.
    """
    down, right = convolution.stride
    convolution.stride = (1, 1)
    convolution.register_forward_pre_hook(lambda _, args: (args[0][..., ::down, ::right],))


def _batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]
