"""Whether a written file without its quantizers and branches is the canonical graph, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxptq.errors import OutputCheckError
from onnxptq.graph import proto
from onnxptq.graph.save import export_node
from onnxptq.graph.surgeon import quiet_surgeon
from onnxptq.types import GRAPH_OUTPUT, Array, CanonicalModel, QuantPlan, Solution
from onnxptq.validate.branches import WrittenBranch, locate_branches
from onnxptq.validate.reading import Pair, WrittenModel


def check_float_graph(
    written: WrittenModel,
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    located: Mapping[str, Pair],
) -> None:
    """Compare everything of the file that is no quantizer and no branch with the canonical graph.

    Args:
        located: the pair of each quantizer of ``plan``.

    Raises:
        OutputCheckError: naming the first node, tensor or initializer that differs.
    """
    _check_header(written, model)
    _check_ends(written, model)
    edges, renamed = _expected_edges(plan, located)
    branches = locate_branches(written, model, solution)
    additions: list[Pair | WrittenBranch] = [*located.values(), *branches.values()]
    own_nodes = {name for added in additions for name in added.nodes}
    own_initializers = {name for added in additions for name in added.initializers}
    checker = _Checker(written, model, edges, renamed, branches)
    checker.sums()
    checker.sources(plan, located)
    checker.nodes(own_nodes)
    checker.initializers(own_initializers, solution)


def _check_header(written: WrittenModel, model: CanonicalModel) -> None:
    opset = proto.default_opset(written.model)
    if opset != model.graph.opset:
        raise OutputCheckError(f"{written.path} declares opset {opset} instead of {model.graph.opset}.")
    needed = onnx.helper.find_min_ir_version_for(written.model.opset_import, True)
    if not needed <= written.model.ir_version <= onnx.IR_VERSION:
        raise OutputCheckError(
            f"{written.path} declares IR version {written.model.ir_version}, "
            f"not {needed} to {onnx.IR_VERSION}."
        )
    if written.model.functions:
        raise OutputCheckError(f"{written.path} holds functions that the model does not.")
    if written.graph.sparse_initializer:
        raise OutputCheckError(f"{written.path} holds sparse initializers.")


def _check_ends(written: WrittenModel, model: CanonicalModel) -> None:
    graph = model.graph
    for what, wanted, found in (
        ("input", graph.inputs, written.graph.input),
        ("output", [t for t in graph.outputs if t.name in model.outputs], written.graph.output),
    ):
        names, present = [tensor.name for tensor in wanted], [entry.name for entry in found]
        if names != present:
            raise OutputCheckError(
                f"{written.path}: the graph {what}s are {', '.join(present)} instead of {', '.join(names)}."
            )
        for tensor, entry in zip(wanted, found, strict=True):
            with quiet_surgeon():
                expected = OnnxExporter.export_value_info_proto(tensor, True)
            if expected.type != entry.type:
                raise OutputCheckError(
                    f"{written.path}: the type or shape of graph {what} '{entry.name}' is not the model's."
                )


def _expected_edges(
    plan: QuantPlan, located: Mapping[str, Pair]
) -> tuple[dict[tuple[str, int], str], dict[str, str]]:
    """What each quantized edge must read, and the new names of tensors whose own name moved to the output."""
    edges: dict[tuple[str, int], str] = {}
    renamed: dict[str, str] = {}
    for quantizer in plan.quantizers:
        pair = located[quantizer.quantizer_id]
        for site in quantizer.sites:
            if site.consumer != GRAPH_OUTPUT:
                edges[site.consumer, site.input_index] = pair.output
            elif pair.source is not None:
                renamed[quantizer.tensor] = pair.source
    return edges, renamed


class _Checker:
    """The comparison of one file."""

    def __init__(
        self,
        written: WrittenModel,
        model: CanonicalModel,
        edges: Mapping[tuple[str, int], str],
        renamed: Mapping[str, str],
        branches: Mapping[str, WrittenBranch],
    ) -> None:
        self.written = written
        self.model = model
        self.edges = edges
        self.renamed = renamed
        self.branches = branches

    def sums(self) -> None:
        """What has a branch must write what its layer would have written, and share no node with another."""
        outputs = {node.name: node.outputs[0].name for node in self.model.graph.nodes if node.outputs}
        seen: set[str] = set()
        for name, branch in self.branches.items():
            if branch.output != self.renamed.get(outputs[name], outputs[name]) or seen & {*branch.nodes}:
                raise OutputCheckError(
                    f"{self.written.path}: the branch beside node '{name}' does not write its output."
                )
            seen |= {*branch.nodes}

    def sources(self, plan: QuantPlan, located: Mapping[str, Pair]) -> None:
        """Every activation quantizer must read its own tensor."""
        for quantizer in plan.quantizers:
            source = located[quantizer.quantizer_id].source
            wanted = self.renamed.get(quantizer.tensor, quantizer.tensor)
            if quantizer.role == "activation" and source != wanted:
                raise OutputCheckError(
                    f"{self.written.path}: the quantizer of '{self.model.user_name(quantizer.tensor)}' "
                    f"reads '{source}' instead."
                )

    def nodes(self, own_nodes: set[str]) -> None:
        """Every node is the quantizers' or the model's, and the model's are all there, unchanged."""
        canonical = {node.name: node for node in self.model.graph.nodes}
        if len(self.written.nodes) != len(self.written.graph.node):
            raise OutputCheckError(f"{self.written.path} holds nodes without a name of their own.")
        for name in self.written.nodes:
            if name not in canonical and name not in own_nodes:
                raise OutputCheckError(
                    f"{self.written.path} holds node '{name}', which neither the model nor the plan has."
                )
        for name, node in canonical.items():
            found = self.written.nodes.get(name)
            if found is None or name in own_nodes:
                raise OutputCheckError(f"{self.written.path}: node '{name}' is missing.")
            problem = self._node_difference(node, found)
            if problem:
                raise OutputCheckError(
                    f"{self.written.path}: {problem} of node '{name}' differ from the model's."
                )

    def _node_difference(self, node: gs.Node, found: onnx.NodeProto) -> str | None:
        with quiet_surgeon():
            wanted = export_node(node)
        if (wanted.op_type, wanted.domain) != (found.op_type, found.domain):
            return "operator and domain"
        names = [self.edges.get((node.name, i), self.renamed.get(t, t)) for i, t in enumerate(wanted.input)]
        if names != list(found.input):
            return "inputs"
        branch = self.branches.get(node.name)
        outputs = [self.renamed.get(t, t) for t in wanted.output] if branch is None else [branch.product]
        if outputs != list(found.output):
            return "outputs"
        for nested in proto.subgraphs_of(wanted):
            self._rename_reads(nested)
        return None if _attributes(wanted) == _attributes(found) else "attributes"

    def _rename_reads(self, graph: onnx.GraphProto) -> None:
        """A nested graph that reads a renamed tensor reads it by its new name."""
        for inner in proto.walk_graphs(graph):
            for node in inner.node:
                for i, name in enumerate(node.input):
                    node.input[i] = self.renamed.get(name, name)

    def initializers(self, own: set[str], solution: Solution) -> None:
        """Every initializer is read, and is a quantizer's or, bit for bit, the model's or the solution's."""
        tensors = self.model.graph.tensors()
        read = _names_read(self.written.graph)
        for name, tensor in self.written.initializers.items():
            if name not in read:
                raise OutputCheckError(f"{self.written.path}: nothing reads initializer '{name}'.")
            if name in own:
                continue
            canonical = tensors.get(name)
            if not isinstance(canonical, gs.Constant):
                raise OutputCheckError(
                    f"{self.written.path} holds initializer '{name}', which neither model nor plan has."
                )
            if not self._is_same(tensor, canonical, solution.weights.get(name)):
                raise OutputCheckError(
                    f"{self.written.path}: initializer '{self.model.user_name(name)}' is not the model's."
                )

    def _is_same(self, tensor: onnx.TensorProto, canonical: gs.Constant, replaced: Array | None) -> bool:
        values = canonical._values
        if replaced is None and isinstance(values, LazyValues):
            wanted = values.tensor
            if wanted.data_type != tensor.data_type or wanted.dims != tensor.dims:
                return False
            if not proto.is_external(tensor) and _payload(wanted) == _payload(tensor):
                return True
            values = onnx.numpy_helper.to_array(wanted)
        wanted_array = np.asarray(values if replaced is None else replaced)
        found = self.written.value(tensor.name)
        if found.dtype != wanted_array.dtype or found.shape != wanted_array.shape:
            return False
        if found.dtype == object:  # strings
            return bool((found == wanted_array).all())
        flat, other = _flat_bytes(found), _flat_bytes(wanted_array)
        step = 1 << 24
        return all(np.array_equal(flat[i : i + step], other[i : i + step]) for i in range(0, flat.size, step))


def _flat_bytes(values: Array) -> Array:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def _payload(tensor: onnx.TensorProto) -> bytes:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = ""
    copy.doc_string = ""
    result: bytes = copy.SerializeToString(deterministic=True)
    return result


def _attributes(node: onnx.NodeProto) -> list[bytes]:
    return sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Names that a node, a nested graph or the graph's caller reads."""
    names = {name for inner in proto.walk_graphs(graph) for node in inner.node for name in node.input}
    return names | {entry.name for inner in proto.walk_graphs(graph) for entry in inner.output}
