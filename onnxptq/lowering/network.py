"""A network as its blocks (or packs of them), each lowered on its own, run one after the other.

Values pass between blocks by tensor name. Where a block needs only the shape of a tensor, a stand-in of
that shape without memory of its own takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_graphsurgeon as gs
import torch

from onnxptq.lowering.module import LoweredModule, lower
from onnxptq.types import Block, Pack

Values = dict[str, torch.Tensor]


class BlockNetwork:
    """The blocks of ``graph``, lowered. Without hooks the composition computes what the whole graph does.

    ``outputs`` are those graph outputs among ``judged`` (all by default) that a block writes.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered.
    """

    def __init__(
        self,
        graph: gs.Graph,
        blocks: Sequence[Block | Pack],
        *,
        judged: Collection[str] | None = None,
        device: str = "cpu",
    ) -> None:
        self.blocks = tuple(blocks)
        self.inputs = tuple(t.name for t in graph.inputs)
        written = {name for block in blocks for name in block.outputs}
        wanted = written if judged is None else written & set(judged)
        self.outputs = tuple(t.name for t in graph.outputs if t.name in wanted)
        self.device = torch.device(device)
        self._shaped = _shape_sources(graph, blocks)
        self.modules: Sequence[LoweredModule] = tuple(
            lower(
                graph,
                inputs=(*block.inputs, *block.shape_inputs),
                outputs=(*block.outputs, *self._shaped[i]),
            ).to(self.device)
            for i, block in enumerate(self.blocks)
        )
        reads = [{*b.inputs, *b.shape_inputs} for b in self.blocks]
        self._last_read = {name: i for i, names in enumerate(reads) for name in names}

    def read_behind(self, position: int) -> frozenset[str]:
        """Tensors that blocks behind the one at ``position`` read."""
        return frozenset(name for name, last in self._last_read.items() if last > position)

    @torch.no_grad()
    def run(self, feed: Mapping[str, torch.Tensor], *, keep: Collection[str] | None = None) -> Values:
        """Every tensor between blocks, and every graph output that a block writes.

        Args:
            feed: one tensor per graph input.
            keep: names of the tensors to return; others are freed after their last reader. None keeps all.
        """
        values: Values = {name: feed[name].to(self.device) for name in self.inputs}
        for i in range(len(self.blocks)):
            values.update(self.run_block(i, values))
            if keep is not None:
                used_up = [n for n in values if n not in keep and self._last_read.get(n, -1) <= i]
                for name in used_up:
                    del values[name]
        return values

    @torch.no_grad()
    def run_block(self, index: int, values: Mapping[str, torch.Tensor]) -> Values:
        """What block ``index`` writes, from values that hold its inputs. Hooks on its module apply."""
        block = self.blocks[index]
        found: Values = self.modules[index](
            {name: values[name] for name in (*block.inputs, *block.shape_inputs)}
        )
        for name in self._shaped[index]:
            found[name] = found[name].new_zeros(()).expand(found[name].shape)
        return found

    @torch.no_grad()
    def run_changed(self, start: int, values: Mapping[str, torch.Tensor], changed: Values) -> Values:
        """What blocks from ``start`` on write once the tensors in ``changed`` take the place of those in
        ``values``. Blocks that read no changed tensor are not run; results equal to the old ones are left out.
        Tensors that no later block reads are freed on the way, graph outputs excepted.
        """
        current = dict(changed)
        for i in range(start, len(self.blocks)):
            block = self.blocks[i]
            names = (*block.inputs, *block.shape_inputs)
            if any(name in current for name in names):
                found = self.run_block(i, {name: current.get(name, values[name]) for name in names})
                current.update({n: v for n, v in found.items() if not is_same(v, values[n])})
            used_up = [n for n in current if n not in self.outputs and self._last_read.get(n, -1) <= i]
            for name in used_up:
                del current[name]
        return current

    @torch.no_grad()
    def measure(self, feed: Mapping[str, torch.Tensor]) -> Mapping[str, int]:
        """Elements of every tensor that a node of a block writes, and of the graph inputs, for this feed."""
        values: Values = {name: feed[name].to(self.device) for name in self.inputs}
        sizes = {name: value.numel() for name, value in values.items()}
        for i, block in enumerate(self.blocks):
            module = self.modules[i]
            written = [
                site.tensor
                for site in block.sites
                if not site.is_weight and site.tensor not in block.inputs and site.tensor not in sizes
            ]
            wanted = tuple(dict.fromkeys((*module.outputs, *written)))
            inputs = {name: values[name] for name in (*block.inputs, *block.shape_inputs)}
            found = module(inputs, fetch=wanted)
            sizes.update({name: value.numel() for name, value in found.items()})
            values.update({name: found[name] for name in module.outputs})
            for name in [n for n in values if self._last_read.get(n, -1) <= i]:
                del values[name]
        return sizes


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape and equal values."""
    return a.shape == b.shape and bool(torch.equal(a, b))


def _shape_sources(graph: gs.Graph, blocks: Sequence[Block | Pack]) -> Sequence[tuple[str, ...]]:
    """Per block, the tensors inside it of which other blocks read the shape."""
    wanted = {name for block in blocks for name in block.shape_inputs}
    owner = {name: i for i, block in enumerate(blocks) for name in block.nodes}
    found: list[list[str]] = [[] for _ in blocks]
    for node in graph.nodes:
        for tensor in node.outputs:
            index = owner.get(node.name)
            if tensor.name in wanted and index is not None and tensor.name not in blocks[index].outputs:
                found[index].append(tensor.name)
    return tuple(map(tuple, found))
