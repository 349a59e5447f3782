"""Tracing: autograd's record of a forward pass, contracted to the primitives of DeepNets-1M.

The conventions are those of the published GHN-2 and GHN-3 graphs, so that their checkpoints mean the same thing here.
Every autograd function is visited once, in execution order. What matters of a function is its *frontier*: the graph
nodes whose outputs reach it with no other node in between. A function that becomes a node takes an edge from each node
of its inputs' frontiers and is its own frontier; any other function passes the union of its inputs' frontiers on, which
is all that contracting it means.
"""

from __future__ import annotations

import heapq
import inspect
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..ambient import plain_torch
from ..errors import TraceError
from .computation_graph import BRANCH_SCALE, NORM_PRIMITIVES, POSITION_BIAS, WEIGHT_PRIMITIVES, ComputationGraph
from .fused import MATMULS as _MATMULS
from .fused import operands_and_readers
from .meta_copy import meta_copy
from .shortest_paths import with_virtual_edges
from .tape import Function, Run, Size, input_candidates, record, run_on_meta

# What autograd calls the products of a layer's input with its weight; the slots that may hold the bias.
_WEIGHTED = {"Convolution": 2, "Addmm": 0, "Addmv": 0, "Baddbmm": 0, "Addbmm": 0, "Linear": 2, "Mm": None, "Mv": None,
             "Bmm": None}  # fmt: skip
_SOFTMAX = frozenset({"Softmax", "SafeSoftmax"})
_CONCAT = frozenset({"Cat", "Stack"})
_RECTIFIERS = ("Relu", "Hard", "Sigmoid")
_LAYER_CLASSES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


@plain_torch()
def trace(model: nn.Module, input_size: int | Size | None = None, inputs: Any = None) -> ComputationGraph:
    """Traces a model into the graph a GHN reads, on the meta device: no arithmetic and no memory for weights.

    The model itself is only read; it may be on any device, in any mode and dtype. It is a copy that runs, and neither
    the model's forward hooks nor the global ones run with it.

    Args:
        model: Any eager module.
        input_size: Input size without the batch dimension, e.g. ``(3, 224, 224)``, or a side length for RGB images. By
            default what the model declares (``pretrained_cfg``, ``img_size``), else ``(3, 224, 224)``.
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
        kept = {name: "frozen (requires_grad=False)" for name, p in model.named_parameters() if not p.requires_grad}
        kept.update((name, "empty") for name, p in model.named_parameters() if p.numel() == 0)
        return _Tracer(duplicate, run, kept).graph()
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


class _Tracer:
    """Builds the graph while it walks the tape once."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        kept: dict[str, str],
    ):
        self.model = model
        self.run = run
        self.tape = tape = record(run.outputs)
        self.parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.owners: dict[str, nn.Module] = {}
        for prefix, module in model.named_modules():
            for name in module._parameters:
                self.owners.setdefault(f"{prefix}.{name}" if prefix else name, module)
        names = {id(parameter): name for name, parameter in self.parameters.items()}

        self.ops = ["input"]
        self.names = ["input"]
        self.shapes: list[Size | None] = [None]
        self.edges: dict[tuple[int, int], list[int]] = defaultdict(list)  # with the functions that read them
        self.node_of: dict[str, int] = {}  # parameter name -> node
        self.kept = kept
        self.roles: dict[str, str] = {}  # parameter name -> what it is if it gets no node

        # Per function: its frontier if it carries data (None otherwise), the parameters it is made of if it does not,
        # and the attention node whose weights it carries to the product with the values.
        self.frontier: list[frozenset[int] | None] = []
        self.sources: list[tuple[str, ...]] = []
        self.attention: list[int | None] = []
        self.weighted: dict[int, list[str]] = {}  # function -> the weights that it applies
        self.leaf_names = [None if f.variable is None else names.get(id(f.variable)) for f in tape]
        leaves = {id(leaf) for leaf in run.leaves}
        self.inputs = {index for index, function in enumerate(tape) if id(function.variable) in leaves}
        self._find_attention()
        self._find_gates()

    # ---- looking ahead ----------------------------------------------------------------------------------------------

    def _find_attention(self) -> None:
        """Tells attention's softmax from a softmax over branches: attention's reaches a matrix product."""
        self.readers: list[list[int]] = [[] for _ in self.tape]
        for index, function in enumerate(self.tape):
            for source in function.inputs:
                if source is not None:
                    self.readers[source].append(index)
        self.is_attention: set[int] = set()
        self.is_attended: set[int] = set()  # the products of attention's weights with the values
        self.is_logit: set[int] = set()
        for index, function in enumerate(self.tape):
            if function.op in _SOFTMAX and self._reaches_matmul(index):
                self.is_attention.add(index)
                self._mark_logits(index)

    def _reaches_matmul(self, index: int) -> bool:
        reached, steps = [index], 0
        while reached and steps < 64:
            steps += 1
            for reader in self.readers[reached.pop()]:
                op = self.tape[reader].op
                if op in _MATMULS:
                    self.is_attended.add(reader)
                    return True
                if not op.startswith("Native"):
                    reached.append(reader)
        return False

    def _mark_logits(self, softmax: int) -> None:
        """Marks what lies between q·k and the softmax: a table added there is a position bias, not an encoding."""
        reached = [softmax]
        while reached:
            index = reached.pop()
            function = self.tape[index]
            sources = [source for source in function.inputs if source is not None]
            # A convolution from logits to logits mixes heads; they were added to before.
            mixes = function.op == "Convolution" and function.shape == self.tape[sources[0]].shape
            if index not in self.is_logit and (mixes or function.op not in _WEIGHTED):
                self.is_logit.add(index)
                reached.extend(sources)

    def _find_gates(self) -> None:
        """Finds squeeze-excite: a product with a factor that was averaged over the positions it now scales."""
        self.gate_slot: dict[int, int] = {}
        self.squeezes: set[int] = set()
        for index, function in enumerate(self.tape):
            if function.op != "Mul" or len(function.inputs) != 2:
                continue
            first, second = function.inputs
            if first is None or second is None:
                continue
            sizes = _numel(self.tape[first].shape), _numel(self.tape[second].shape)
            if sizes[0] == sizes[1]:  # it was expanded to the features' size, or there is one position only
                gate = int(first < second)
                squeezes = self._squeezes_between(min(first, second), max(first, second))
            else:
                gate = int(sizes[0] > sizes[1])
                squeezes = self._squeezes_behind((first, second)[gate], max(sizes))
            if squeezes:
                self.gate_slot[index] = gate
                self.squeezes |= squeezes

    def _is_squeeze(self, index: int) -> bool:
        """Whether a function makes one vector of all positions: their mean, or their sum weighted by attention."""
        function = self.tape[index]
        return _averages_positions(function) or (index in self.is_attended and 1 in function.shape[-2:])

    def _squeezes_behind(self, gate: int, size: int) -> set[int]:
        """What squeezes positions among the functions smaller than `size` that a gate is made of."""
        squeezes: set[int] = set()
        reached: list[int | None] = [gate]
        seen = set()
        while reached:
            index = reached.pop()
            if index is None or index in seen or _numel(self.tape[index].shape) >= size:
                continue
            seen.add(index)
            if self._is_squeeze(index):
                squeezes.add(index)
            else:
                reached.extend(self.tape[index].inputs)
        return squeezes

    def _squeezes_between(self, features: int, gate: int) -> set[int]:
        """What squeezes positions on each way from the features to a gate as large as they are; nothing if there is a
        way around."""
        whole: set[int | None] = {features}
        squeezed: set[int | None] = set()
        squeezes: set[int] = set()
        for index in range(features + 1, min(gate, features + 64) + 1):
            sources = self.tape[index].inputs
            if whole.isdisjoint(sources):
                if not squeezed.isdisjoint(sources):
                    squeezed.add(index)
            elif self._is_squeeze(index):
                squeezed.add(index)
                squeezes.add(index)
            else:
                whole.add(index)
        return squeezes if gate in squeezed else set()

    # ---- the walk ---------------------------------------------------------------------------------------------------

    def graph(self) -> ComputationGraph:
        for index, function in enumerate(self.tape):
            frontier, sources = self._visit(index, function)
            self.frontier.append(frontier)
            self.sources.append(sources)
        self._explain_the_rest()
        head = self._head()
        return self._ordered(head)

    def _visit(self, index: int, function: Function) -> tuple[frozenset[int] | None, tuple[str, ...]]:
        """The function's frontier and the parameters it is made of; at most one of the two says something."""
        self.attention.append(self._attention_of(function))
        if function.variable is not None:
            if index in self.inputs:
                return frozenset({0}), ()
            name = self.leaf_names[index]
            return None, () if name is None else (name,)

        data = [i for i in function.inputs if i is not None and self.frontier[i] is not None]
        made_of = [
            () if i is None or self.frontier[i] is not None else self.sources[i] for i in function.inputs
        ]  # per slot
        reach = frozenset().union(*(self.frontier[i] or () for i in data))
        parameters = tuple(dict.fromkeys(name for names in made_of for name in names))

        if norm := self._norm_weight(parameters, data):
            return self._parameter_node(norm, "bn" if _is_batch_norm(self.owners[norm]) else "ln", reach), ()
        if function.op in _WEIGHTED and (weights := self._weights(function, made_of, data)):
            self.weighted[index] = weights
            return self._weighted(function, weights, made_of, reach), ()
        if not data:
            return None, parameters
        return self._data_op(index, function, data, parameters, reach), ()

    def _attention_of(self, function: Function) -> int | None:
        tags = [self.attention[i] for i in function.inputs if i is not None]
        return next((tag for tag in tags if tag is not None), None)

    def _norm_weight(self, parameters: tuple[str, ...], data: list[int]) -> str | None:
        if not data and len(parameters) < 3:  # a norm over a token: weight, bias and what they are applied to
            return None
        for name in parameters:
            unseen = name not in self.node_of and name not in self.kept
            if unseen and _is_norm(self.owners[name]) and name.rpartition(".")[2] == "weight":
                return name
        return None

    def _weights(self, function: Function, made_of: list[tuple[str, ...]], data: list[int]) -> list[str]:
        """The weights a product applies to its input; none if both factors are data."""
        bias_slot = _WEIGHTED[function.op]
        names = [name for slot, names in enumerate(made_of) if slot != bias_slot for name in names]
        if not data:
            # Both factors are parameters or constants: a layer all the same if one belongs to a layer (the query of a
            # learned token, a network over coordinates), else only a transformed parameter.
            names = [name for name in names if isinstance(self.owners[name], _LAYER_CLASSES)]
        matrices = [name for name in names if _varied_dims(self.parameters[name]) > 1]
        largest = sorted(names, key=lambda name: -self.parameters[name].numel())[:1]
        return matrices or largest

    def _weighted(
        self, function: Function, weights: list[str], made_of: list[tuple[str, ...]], reach: frozenset[int]
    ) -> frozenset[int]:
        op = "conv"
        if function.op == "Convolution" and function.saved._saved_groups > 1:
            op = "dil_conv" if max(function.saved._saved_dilation) > 1 else "sep_conv"
        nodes = frozenset().union(*(self._parameter_node(name, op, reach) for name in weights))
        bias_slot = _WEIGHTED[function.op]
        for bias in made_of[bias_slot] if bias_slot is not None else ():
            nodes = self._parameter_node(bias, "bias", nodes)
        return nodes

    def _data_op(
        self, index: int, function: Function, data: list[int], parameters: tuple[str, ...], reach: frozenset[int]
    ) -> frozenset[int]:
        op = function.op
        if index in self.is_attention:
            self.attention[index] = len(self.ops)
            return self._op_node("msa", function, reach)
        if op.startswith("ScaledDotProduct"):
            return self._op_node("msa", function, reach)
        if op in _MATMULS and len(data) > 1 and self.attention[index] is not None:
            return self._close_attention(index, data)
        if "Pool" in op and (kernel := _pool_kernel(function)):
            return self._op_node("max_pool" if "MaxPool" in op else "avg_pool", function, reach, (1, 1, *kernel))
        if _averages_positions(function):
            return reach if index in self.squeezes else self._op_node("glob_avg", function, reach)
        if op in ("Add", "CopySlices") and parameters:  # the latter is an addition in place, into a part of a tensor
            return self._added_parameter(index, function, parameters, reach)
        # A temperature of logits that a position bias is added to is no branch's.
        if op == "Mul" and parameters and index not in self.is_logit and self._joins_others(index):
            scales = [name for name in parameters if _varied_dims(self.parameters[name]) <= 1]
            self.roles.update(dict.fromkeys(scales, BRANCH_SCALE))
        if len(reach) > 1 and (op in ("Add", "Sub") or op in _CONCAT) and len(data) > 1:
            return self._op_node("concat" if op in _CONCAT else "sum", function, reach)
        if index in self.gate_slot and len(reach) > 1 and self._gate_is_seen(index):
            return self._op_node("cse", function, reach)
        return reach

    def _close_attention(self, index: int, data: list[int]) -> frozenset[int]:
        """The product of attention weights and values: the values flow into the attention node, and only it goes on."""
        node = self.attention[index]
        assert node is not None
        self.attention[index] = None
        weights = [i for i in data if self.attention[i] is not None]
        values = frozenset().union(*(self.frontier[i] or () for i in data if self.attention[i] is None))
        self._connect(values, node)
        return frozenset().union(*(self.frontier[i] or () for i in weights))

    def _added_parameter(
        self, index: int, function: Function, parameters: tuple[str, ...], reach: frozenset[int]
    ) -> frozenset[int]:
        """A bias that autograd recorded as an addition of its own, or a position embedding."""
        for name in parameters:
            parameter = self.parameters[name]
            behind = {self.node_of.get(sibling) for sibling in self._siblings(name)} & reach
            if len(behind) == len(reach) == 1 and _varied_dims(parameter) <= 1:
                reach = self._parameter_node(name, "bias", reach)
            elif index in self.is_logit:
                operands = [i for i in function.inputs if i is not None and name in self.sources[i]]
                if any(self.tape[i].shape[-1:] > (1,) for i in operands):  # it differs from key to key
                    self.roles[name] = POSITION_BIAS
            elif (
                name not in self.node_of
                and name not in self.kept
                and _is_position_embedding(name, parameter, function.shape)
            ):
                self._parameter_node(name, "pos_enc", frozenset())
                reach = self._op_node("sum", function, reach | {self.node_of[name]})
        return reach

    def _joins_others(self, index: int) -> bool:
        """Whether a scaled branch goes straight into a sum or concatenation."""
        while len(self.readers[index]) == 1:
            (index,) = self.readers[index]
            function = self.tape[index]
            if function.op == "Add":  # of a parameter: the scale and it are an affine layer
                return all(source is not None and self.leaf_names[source] is None for source in function.inputs)
            if function.op in _CONCAT:
                return True
            if sum(source is not None for source in function.inputs) > 1:
                return False
        readers = self.readers[index]
        return bool(readers) and all(self.tape[reader].op in _CONCAT for reader in readers)

    def _gate_is_seen(self, index: int) -> bool:
        """Whether the published code sees this gate, which its checkpoints were trained with.

        It recognises the product by what stands beside it in a traversal that starts at the output and goes into first
        factors first: a gate that is the first factor, features that come straight from a rectifier, or the last gate
        before the head's pooling. The rest are contracted.
        """
        slot = self.gate_slot[index]
        features = self.tape[index].inputs[1 - slot]
        assert features is not None
        if slot == 0 or self.tape[features].op.startswith(_RECTIFIERS):
            return True
        for _ in range(3):
            readers = self.readers[index]
            if len(readers) != 1:
                return False
            index = readers[0]
            if _averages_positions(self.tape[index]):
                return index not in self.squeezes
            if self.tape[index].op not in ("Add", "Relu"):
                return False
        return False

    # ---- nodes and edges --------------------------------------------------------------------------------------------

    def _op_node(self, op: str, function: Function, reach: Iterable[int], shape: Size | None = None) -> frozenset[int]:
        return self._node(op, function.name, shape, reach)

    def _parameter_node(self, name: str, op: str, reach: frozenset[int]) -> frozenset[int]:
        """The parameter's node; a parameter that is used again keeps its one node and gets the further inputs."""
        if name in self.kept:
            return reach
        if name in self.node_of:
            node = self.node_of[name]
            return frozenset({node}) if self._connect(reach, node) else reach | {node}
        self.node_of[name] = len(self.ops)
        return self._node(op, name, tuple(self.parameters[name].shape), reach)

    def _node(self, op: str, name: str, shape: Size | None, reach: Iterable[int]) -> frozenset[int]:
        node = len(self.ops)
        self.ops.append(op)
        self.names.append(name)
        self.shapes.append(shape)
        self._add_edges(reach, node)
        return frozenset({node})

    def _add_edges(self, sources: Iterable[int], node: int) -> None:
        for source in sources:
            self.edges[source, node].append(len(self.frontier))  # the function that is being visited

    def _connect(self, sources: Iterable[int], node: int) -> bool:
        """Adds edges into an existing node unless one would close a cycle."""
        below, stack = {node}, [node]
        while stack:
            current = stack.pop()
            for source, target in self.edges:
                if source == current and target not in below:
                    below.add(target)
                    stack.append(target)
        if not below.isdisjoint(sources):
            return False
        self._add_edges(sources, node)
        return True

    def _siblings(self, name: str) -> list[str]:
        prefix = name.rpartition(".")[0]
        return [f"{prefix}.{other}" if prefix else other for other in self.owners[name]._parameters]

    # ---- finishing --------------------------------------------------------------------------------------------------

    def _explain_the_rest(self) -> None:
        """Gives every parameter without a node its reason; a norm's bias is predicted with the norm's weight."""
        reached = {name for name in self.leaf_names if name is not None}
        if NORM_PRIMITIVES.isdisjoint(self.ops):  # branches as strong as their input would add up to infinity
            self.roles = {name: role for name, role in self.roles.items() if role != BRANCH_SCALE}
        for name, parameter in self.parameters.items():
            if name in self.node_of or name in self.kept:
                continue
            weight = f"{name.removesuffix('bias')}weight"
            if name.endswith("bias") and weight in self.node_of and self.ops[self.node_of[weight]] in NORM_PRIMITIVES:
                continue
            if name not in reached:
                self.kept[name] = _unreached_reason(self.run.uses(parameter))
            else:
                self.kept[name] = self.roles.get(name) or _kept_reason(name, parameter)

    def _head(self) -> tuple[str, ...]:
        """The classification layer: the last weight before a single [batch, classes] output, then its bias."""
        if len(self.run.outputs) != 1 or self.run.outputs[0].ndim != 2 or getattr(self.model, "num_classes", None) == 0:
            return ()
        classes = self.run.outputs[0].shape[1]
        pending = list(self.frontier[-1] or ())
        weights, biases, seen = [], [], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            shape = self.shapes[node]
            is_layer = self.ops[node] in WEIGHT_PRIMITIVES or self.ops[node] == "bias"
            if is_layer and (shape is None or shape[0] != classes):
                continue
            if self.ops[node] in WEIGHT_PRIMITIVES:
                weights.append(node)
                continue
            if self.ops[node] == "bias":
                biases.append(node)
            elif self.ops[node] not in ("sum", "concat", "glob_avg", "avg_pool", "max_pool"):
                continue
            pending.extend(source for source, target in self.edges if target == node)
        return tuple(self.names[node] for node in sorted(weights) + sorted(biases)) if weights else ()

    def _ordered(self, head: tuple[str, ...]) -> ComputationGraph:
        """Topological order that stays as close to execution order as possible."""
        fed = {target for _, target in self.edges}
        for node in range(1, len(self.ops)):
            if node not in fed and self.ops[node] != "pos_enc":
                self._add_edges((0,), node)  # e.g. a network over constant coordinates
        waiting = [0] * len(self.ops)
        successors: list[list[int]] = [[] for _ in self.ops]
        for source, target in sorted(self.edges):
            waiting[target] += 1
            successors[source].append(target)
        ready = [node for node, count in enumerate(waiting) if count == 0]
        order: list[int] = []
        while ready:
            node = heapq.heappop(ready)
            order.append(node)
            for target in successors[node]:
                waiting[target] -= 1
                if waiting[target] == 0:
                    heapq.heappush(ready, target)
        rank = {node: position for position, node in enumerate(order)}
        operands, readers = operands_and_readers(
            self.tape, self.frontier, self.attention, self.weighted, self.leaf_names, self.parameters, self.ops,
            self.names, self.edges,
        )  # fmt: skip
        return ComputationGraph(
            ops=[self.ops[node] for node in order],
            names=[self.names[node] for node in order],
            shapes=[self._node_shape(node, head) for node in order],
            edges=with_virtual_edges(len(order), [(rank[source], rank[target]) for source, target in self.edges]),
            head=head,
            kept=self.kept,
            operands=operands,
            readers={(rank[source], rank[target]): read for (source, target), read in readers.items()},
        )

    def _node_shape(self, node: int, head: tuple[str, ...]) -> Size | None:
        shape = self.shapes[node]
        if shape is not None and self.names[node] in head and shape[2:] == (1, 1):
            return shape[:2]  # a classifier written as a 1x1 convolution is a matrix like any other
        return shape


def _numel(shape: Size) -> int:
    return torch.Size(shape).numel()


def _varied_dims(parameter: torch.Tensor) -> int:
    """Dimensions along which a parameter can vary."""
    return sum(size > 1 for size in parameter.shape)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    )


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or "batchnorm" in type(module).__name__.lower()


def _averages_positions(function: Function) -> bool:
    """Whether a function averages over all positions of a feature map or token sequence, keeping channels apart."""
    if function.op.startswith("AdaptiveAvgPool"):
        return True
    if function.name != "MeanBackward1":
        return False
    dims, size = function.saved._saved_dim, function.saved._saved_self_sym_sizes
    if dims is None:
        return False
    return len(dims) > 1 or (len(size) == 3 and not function.saved._saved_keepdim)


def _pool_kernel(function: Function) -> Size | None:
    """Kernel (height, width) of a pooling function; an adaptive pooling's is what it divides its input into."""
    node = function.saved
    if hasattr(node, "_saved_kernel_size"):
        kernel = tuple(node._saved_kernel_size)
    elif function.op.startswith("AdaptiveMaxPool"):
        kernel = tuple(max(1, i // o) for i, o in zip(node._saved_self.shape[2:], function.shape[2:], strict=True))
    else:
        return None
    return (kernel * 2)[-2:] if len(kernel) == 1 else kernel[-2:]


def _is_position_embedding(name: str, parameter: nn.Parameter, shape: Size) -> bool:
    """A table that varies over positions and channels and is added to features, as opposed to a per-channel shift."""
    local = name.rpartition(".")[2]
    return _varied_dims(parameter) > 1 and ("pos" in local or parameter.numel() == _numel(shape))


def _unreached_reason(uses: set[bool]) -> str:
    if not uses:
        return "not used by the forward pass"
    return "not part of the output, or detached from it" if True in uses else "used without gradients (no_grad)"


def _kept_reason(name: str, parameter: nn.Parameter) -> str:
    local = name.rpartition(".")[2].lower()
    if "rel" in local or "bias_table" in local or "attention_bias" in local:
        return "relative position table"
    if "token" in local or local in ("latent", "query", "probe"):
        return "learned token"
    if "pos" in local:
        return "position table of an unusual layout"
    if _varied_dims(parameter) <= 1:
        return "scale or shift without a norm"
    return "no primitive for it"
