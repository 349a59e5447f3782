"""Autograd's record of a forward pass, contracted to the primitives of DeepNets-1M.

The conventions are those of the published GHN-2 and GHN-3 graphs, so that their checkpoints mean the same thing here.
Every autograd function is visited once, in execution order. What matters of a function is its *frontier*: the graph
nodes whose outputs reach it with no other node in between. A function that becomes a node takes an edge from each node
of its inputs' frontiers and is its own frontier; any other function passes the union of its inputs' frontiers on, which
is all that contracting it means.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from .annotate import MATMULS, WEIGHTED, annotate, ends_branch
from .computation_graph import ComputationGraph
from .draft import Draft, Nodes
from .fused import operands_and_readers
from .kept import Kept
from .primitives import NORMS, PRIMITIVES, WEIGHTS, Carries, Visit, primitive, varied_dims
from .record import Function, Size, Tape
from .shortest_paths import with_virtual_edges

_LAYER_CLASSES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


def contract(tape: Tape, frozen: Collection[str] = ()) -> ComputationGraph:
    """The graph of primitives in what a forward pass left behind; frozen parameters get no nodes."""
    walk = _Walk(tape, frozen)
    for index, function in enumerate(tape.functions):
        walk.flows.append(walk.visit(index, function))
    draft, kept, head = walk.draft, walk.reasons(), walk.head()

    fed = {target for _, target in draft.edges}
    for node in range(1, len(draft.ops)):
        if node not in fed and draft.ops[node] != "pos_enc":
            draft.read((0,), node)  # e.g. a network over constant coordinates
    operands, readers = operands_and_readers(
        tape, [flow.frontier for flow in walk.flows], [flow.attention for flow in walk.flows], walk.weighted, draft
    )
    order = draft.order()
    rank = {node: position for position, node in enumerate(order)}
    return ComputationGraph(
        ops=[draft.ops[node] for node in order],
        names=[draft.names[node] for node in order],
        shapes=[_shape(draft, node, head) for node in order],
        edges=with_virtual_edges(len(order), [(rank[source], rank[target]) for source, target in draft.edges]),
        head=head,
        kept=kept,
        operands=operands,
        readers={(rank[source], rank[target]): read for (source, target), read in readers.items()},
    )


class Flow(NamedTuple):
    """What a function passes on.

    Attributes:
        frontier: The nodes that reach it with no other in between; None if it carries no data.
        made_of: The parameters that it is made of, if it carries no data.
        attention: The node of the attention whose weights it carries from the softmax to the values, if it does.
    """

    frontier: Nodes | None = None
    made_of: tuple[str, ...] = ()
    attention: int | None = None


class _Walk:
    """Draws the graph while it walks a tape once.

    Attributes:
        flows: Of the functions visited so far.
        draft: The graph so far.
        kept: Parameters that get no node whatever the tape says.
        weighted: The functions that apply weights, with the names of these.
        roles: What parameters are, should they get no node.
    """

    def __init__(self, tape: Tape, frozen: Collection[str]):
        self.tape, self.notes = tape, annotate(tape)
        self.flows: list[Flow] = []
        self.draft = Draft()
        self.kept = {name: Kept.FROZEN for name in tape.parameters if name in frozen}
        self.kept.update((name, Kept.EMPTY) for name, p in tape.parameters.items() if p.numel() == 0)
        self.weighted: dict[int, list[str]] = {}
        self.roles: dict[str, Kept] = {}

    def visit(self, index: int, function: Function) -> Flow:
        """Contracts one function."""
        if index in self.tape.inputs:
            return Flow(frozenset({0}))
        if function.variable is not None:
            name = self.tape.names[index]
            return Flow(made_of=() if name is None else (name,))
        self.draft.reader = index
        visit, attention = self._arrive(index, function)
        if norm := self._norm(visit):
            return Flow(self._place(visit, Carries.NORM, norm, visit.reach), attention=attention)
        if weights := self._weights(visit):
            return Flow(self._layer(visit, weights), attention=attention)
        if not visit.data:
            return Flow(made_of=visit.parameters, attention=attention)
        if attention is not None and function.op in MATMULS and len(visit.data) > 1:
            return Flow(self._attended(visit, attention))
        if visit.parameters and function.op in ("Add", "CopySlices"):  # the latter adds in place, to a part of a tensor
            return Flow(self._shifted(visit), attention=attention)
        if visit.parameters and function.op == "Mul":
            self._note_scales(visit)
        if (op := primitive(Carries.NOTHING, visit)) is None:
            return Flow(visit.reach, attention=attention)
        node = self._draw(visit, op, visit.reach)
        return Flow(node, attention=min(node) if index in self.notes.attentions else attention)

    def _arrive(self, index: int, function: Function) -> tuple[Visit, int | None]:
        """What comes in: data and parameters, and the attention whose weights are among it."""
        flows = [Flow() if i is None else self.flows[i] for i in function.inputs]
        data = [i for i in function.inputs if i is not None and self.flows[i].frontier is not None]
        made_of = [flow.made_of for flow in flows]
        parameters = tuple(dict.fromkeys(name for names in made_of for name in names))
        reach = frozenset().union(*[flow.frontier for flow in flows if flow.frontier is not None])
        attention = next((flow.attention for flow in flows if flow.attention is not None), None)
        return Visit(self.tape, self.notes, index, function, data, made_of, parameters, reach), attention

    def _norm(self, visit: Visit) -> str | None:
        """The weight of the norm that a function applies, if it is the first to read it."""
        if not visit.data and len(visit.parameters) < 3:  # over a token: weight, bias and what they are applied to
            return None
        for name in visit.parameters:
            unseen = name not in self.draft.node_of and name not in self.kept
            if unseen and _is_norm(self.tape.owners[name]) and name.rpartition(".")[2] == "weight":
                return name
        return None

    def _weights(self, visit: Visit) -> list[str]:
        """The weights that a product applies to its input; none if both factors are data."""
        if visit.function.op not in WEIGHTED:
            return []
        bias_slot = WEIGHTED[visit.function.op]
        names = [name for slot, names in enumerate(visit.made_of) if slot != bias_slot for name in names]
        if not visit.data:
            # Both factors are parameters or constants: a layer all the same if one belongs to a layer (the query of a
            # learned token, a network over coordinates), else only a transformed parameter.
            names = [name for name in names if isinstance(self.tape.owners[name], _LAYER_CLASSES)]
        matrices = [name for name in names if varied_dims(self.tape.parameters[name]) > 1]
        largest = sorted(names, key=lambda name: -self.tape.parameters[name].numel())[:1]
        return matrices or largest

    def _layer(self, visit: Visit, weights: list[str]) -> Nodes:
        """A weight's node, and behind it those of its bias."""
        self.weighted[visit.index] = weights
        nodes = frozenset().union(*(self._place(visit, Carries.WEIGHT, name, visit.reach) for name in weights))
        bias_slot = WEIGHTED[visit.function.op]
        for bias in visit.made_of[bias_slot] if bias_slot is not None else ():
            nodes = self._place(visit, Carries.BIAS, bias, nodes)
        return nodes

    def _attended(self, visit: Visit, attention: int) -> Nodes:
        """The product of attention weights and values: the values flow into the attention node, and only it goes on."""
        values = [self.flows[i].frontier or () for i in visit.data if self.flows[i].attention is None]
        self.draft.connect(frozenset().union(*values), attention)
        weights = [self.flows[i].frontier or () for i in visit.data if self.flows[i].attention is not None]
        return frozenset().union(*weights)

    def _shifted(self, visit: Visit) -> Nodes:
        """A bias that autograd recorded as an addition of its own, a position embedding, or neither."""
        reach, function = visit.reach, visit.function
        for name in visit.parameters:
            behind = {self.draft.node_of.get(sibling) for sibling in self._siblings(name)} & reach
            if len(behind) == len(reach) == 1 and varied_dims(self.tape.parameters[name]) <= 1:
                reach = self._place(visit, Carries.BIAS, name, reach)
            elif visit.index in self.notes.logits:
                operands = [i for i in function.inputs if i is not None and name in self.flows[i].made_of]
                if any(self.tape.functions[i].shape[-1:] > (1,) for i in operands):  # it differs from key to key
                    self.roles[name] = Kept.POSITION_BIAS
            elif name not in self.draft.node_of and name not in self.kept and primitive(Carries.TABLE, visit, name):
                reach = self._draw(visit, "sum", reach | self._place(visit, Carries.TABLE, name, frozenset()))
        return reach

    def _note_scales(self, visit: Visit) -> None:
        # A temperature of logits that a position bias is added to is no branch's.
        if visit.index not in self.notes.logits and ends_branch(self.tape, visit.index):
            scales = [name for name in visit.parameters if varied_dims(self.tape.parameters[name]) <= 1]
            self.roles.update(dict.fromkeys(scales, Kept.BRANCH_SCALE))

    def _draw(self, visit: Visit, op: str, sources: Nodes) -> Nodes:
        return self.draft.add(op, visit.function.name, PRIMITIVES[op].shape(visit), sources)

    def _place(self, visit: Visit, carries: Carries, name: str, sources: Nodes) -> Nodes:
        """The node of a parameter, unless it is to have none."""
        if name in self.kept:
            return sources
        op = primitive(carries, visit, name)
        assert op is not None
        return self.draft.add_parameter(op, name, tuple(self.tape.parameters[name].shape), sources)

    def _siblings(self, name: str) -> list[str]:
        prefix = name.rpartition(".")[0]
        return [f"{prefix}.{other}" if prefix else other for other in self.tape.owners[name]._parameters]

    # ---- when all is visited ----------------------------------------------------------------------------------------

    def reasons(self) -> dict[str, Kept]:
        """Why each parameter without a node has none; a norm's bias is predicted with the norm's weight."""
        kept, draft = dict(self.kept), self.draft
        reached = set(self.tape.names)
        for name, parameter in self.tape.parameters.items():
            if name in draft.node_of or name in kept:
                continue
            weight = f"{name.removesuffix('bias')}weight"
            if name.endswith("bias") and weight in draft.node_of and draft.ops[draft.node_of[weight]] in NORMS:
                continue
            role = self.roles.get(name)
            if role is Kept.BRANCH_SCALE and NORMS.isdisjoint(draft.ops):
                role = None  # branches as strong as their input would add up to infinity
            if name not in reached:
                kept[name] = _why_unreached(self.tape.run.uses(parameter))
            else:
                kept[name] = role or _why_without_node(name, parameter)
        return kept

    def head(self) -> tuple[str, ...]:
        """The classification layer: the last weight before a single [batch, classes] output, then its bias."""
        outputs, draft = self.tape.run.outputs, self.draft
        if len(outputs) != 1 or outputs[0].ndim != 2 or getattr(self.tape.model, "num_classes", None) == 0:
            return ()
        classes = outputs[0].shape[1]
        pending = list(self.flows[-1].frontier or ())
        weights, biases, seen = [], [], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            op, shape = draft.ops[node], draft.shapes[node]
            if (op in WEIGHTS or op == "bias") and (shape is None or shape[0] != classes):
                continue
            if op in WEIGHTS:
                weights.append(node)
                continue
            if op == "bias":
                biases.append(node)
            elif op not in ("sum", "concat", "glob_avg", "avg_pool", "max_pool"):
                continue
            pending.extend(source for source, target in draft.edges if target == node)
        return tuple(draft.names[node] for node in sorted(weights) + sorted(biases)) if weights else ()


def _shape(draft: Draft, node: int, head: tuple[str, ...]) -> Size | None:
    shape = draft.shapes[node]
    if shape is not None and draft.names[node] in head and shape[2:] == (1, 1):
        return shape[:2]  # a classifier written as a 1x1 convolution is a matrix like any other
    return shape


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    )


def _why_unreached(uses: set[bool]) -> Kept:
    if not uses:
        return Kept.UNUSED
    return Kept.DETACHED if True in uses else Kept.WITHOUT_GRADIENT


def _why_without_node(name: str, parameter: nn.Parameter) -> Kept:
    local = name.rpartition(".")[2].lower()
    if "rel" in local or "bias_table" in local or "attention_bias" in local:
        return Kept.POSITION_TABLE
    if "token" in local or local in ("latent", "query", "probe"):
        return Kept.TOKEN
    if "pos" in local:
        return Kept.UNUSUAL_POSITIONS
    return Kept.AFFINE if varied_dims(parameter) <= 1 else Kept.NO_PRIMITIVE
