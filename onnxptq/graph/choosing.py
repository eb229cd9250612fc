"""Finds values that only choose: the distances of a search for nearest neighbours, of which the positions are used.

Such values end in TopK or ArgMin, and what these find ends where a Gather takes elements. A rounding error on the
way adds no noise to anything: it changes which elements are taken, and no range of a grid makes that small.
"""

from __future__ import annotations

from onnxptq.graph.index import SHAPE_READERS, GraphIndex
from onnxptq.graph.movements import MOVEMENTS

_MOVING = frozenset({*MOVEMENTS, "Cast", "Dropout", "Identity"})
_ARITHMETIC = frozenset(
    {"Abs", "Add", "Clip", "Div", "Exp", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Sqrt", "Sub"}
)
_POSITIONS = {"ArgMax": 0, "ArgMin": 0, "TopK": 1}
"""Which output of an operator holds positions of what it reads."""
_TAKING = frozenset({"Gather", "GatherElements", "GatherND"})


def only_chooses(index: GraphIndex, tensor: str) -> bool:
    """Whether all that is computed from ``tensor`` ends as positions at which elements are taken."""
    waiting, seen, is_taken = [(tensor, False)], set(), False
    while waiting:
        name, is_position = current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if name in index.output_names:
            return False
        for use in index.uses(name):
            node = use.node
            if is_position and node.op in _TAKING and use.index == 1:
                is_taken = True
            elif not is_position and node.op in _POSITIONS and use.index == 0:
                found = _POSITIONS[node.op]
                waiting += [(t.name, i == found) for i, t in enumerate(node.outputs) if t.name]
            elif node.op in _MOVING | _ARITHMETIC:
                waiting += [(t.name, is_position) for t in node.outputs if t.name]
            elif node.op not in SHAPE_READERS:
                return False
    return is_taken
