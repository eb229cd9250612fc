"""The typed, frozen artefacts that pass between stages, and the leaf values they are made of.

Nothing here computes more than a property; stages import this module and never each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
Sample = Mapping[str, Array]
"""One forward pass worth of inputs, keyed by graph input name, batch axis included."""

GRAPH_OUTPUT = "<graph output>"
"""The consumer of a site whose tensor is read by the graph's caller."""

Storage = Literal["int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"]
_STORAGE_LIMITS: Mapping[str, tuple[int, int]] = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QType:
    """An integer grid, separate from the ONNX type that stores it (ONNX has no 3- or 6-bit type)."""

    bits: int
    qmin: int
    qmax: int
    storage: Storage

    def __post_init__(self) -> None:
        low, high = self.storage_limits
        if not low <= self.qmin < self.qmax <= high:
            raise ValueError(f"grid [{self.qmin}, {self.qmax}] does not fit {self.storage} [{low}, {high}]")

    @property
    def storage_limits(self) -> tuple[int, int]:
        """Smallest and largest integer of the storage type."""
        return _STORAGE_LIMITS[self.storage]

    @property
    def is_narrow(self) -> bool:
        """Whether the grid is smaller than the storage, so that saturation needs an explicit Clip."""
        return (self.qmin, self.qmax) != self.storage_limits

    @property
    def is_signed(self) -> bool:
        """Whether the storage type is signed."""
        return not self.storage.startswith("u")

    @staticmethod
    def signed(bits: int, storage: Storage = "int8") -> QType:
        """The two's complement grid [-2^(bits-1), 2^(bits-1) - 1]."""
        return QType(bits=bits, qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1, storage=storage)

    @staticmethod
    def unsigned(bits: int, storage: Storage = "uint8") -> QType:
        """The grid [0, 2^bits - 1]."""
        return QType(bits=bits, qmin=0, qmax=2**bits - 1, storage=storage)


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale per index of ``axis`` (the axis kept)."""

    axis: int


@dataclass(frozen=True, slots=True)
class PerGroup:
    """One scale per ``group_size`` consecutive elements along ``axis`` (the axis split)."""

    axis: int
    group_size: int


Granularity = PerTensor | PerAxis | PerGroup


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QParams:
    """What turns floats into integers and back.

    x_hat = (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) scale.

    ``scale`` is float32 and positive; ``zero_point`` is int32 and of the same shape: () per tensor,
    (n,) per axis, the tensor's shape with ``axis`` divided by ``group_size`` per group.
    """

    scale: FloatArray
    zero_point: npt.NDArray[np.int32]
    qtype: QType
    granularity: Granularity


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Site:
    """An edge that may carry a quantizer: ``tensor`` as read by input ``input_index`` of ``consumer``.

    ``consumer`` is a node name, or GRAPH_OUTPUT where the graph's caller reads the tensor.
    """

    tensor: str
    consumer: str
    input_index: int
    is_weight: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """What is decided for one Q/DQ pair: the tensor, its grid, and the edges that read the quantized values.

    ``quantizer_id`` is unique in a plan. Quantizers with one ``scale_group`` share scale and zero point.
    ``bounds`` are limits that the tensor cannot leave, known from the operator that writes it.
    A bias (``role``) takes the scale ``scale(activation) * scale(weight)`` of the two quantizers named in
    ``derived_from``.
    """

    quantizer_id: str
    tensor: str
    role: Literal["activation", "weight", "bias"]
    qtype: QType
    granularity: Granularity
    symmetric: bool
    sites: tuple[Site, ...]
    scale_group: str
    derived_from: tuple[str, str] | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantPlan:
    """Every quantizer of a model for one target, and what was left in float."""

    target: str
    quantizers: tuple[Quantizer, ...]
    skips: tuple[Skip, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Branch:
    """A float path of low rank beside a layer with quantized weights; it adds up(down(x)) for what the layer reads.

    Attributes:
        down, up: the constants of its two operators, in the form that these take: (K, r) and (r, channels) beside
            MatMul and Gemm, (r, inputs, *kernel) and (channels, r, 1, ...) beside Conv.
        before, after: noise over signal of the layer's output on calibration samples, without and with the branch,
            when its weight was rounded.
    """

    down: FloatArray
    up: FloatArray
    before: float
    after: float

    @property
    def rank(self) -> int:
        """r."""
        return int(self.up.shape[1] if self.up.ndim > 2 else self.up.shape[0])

    @property
    def parameters(self) -> int:
        """Elements of both constants."""
        return int(self.down.size + self.up.size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """The parameters of every quantizer, by id, the weights that replace float ones, by tensor name, and the branches
    beside layers, by the name of the layer's node."""

    qparams: Mapping[str, QParams]
    weights: Mapping[str, Array] = field(default_factory=dict)
    branches: Mapping[str, Branch] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skip:
    """Something that onnxptq declined to do, and why. ``site`` names it in the user's own names."""

    site: str
    reason: str


ShiftedPlace = Literal["between layers", "behind activations", "in attention"]
"""Where channels are shifted: wherever biases place them, by a subtraction, or in the values of attention alone."""

BlockKind = Literal["plain", "fork", "region", "joined", "float"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A reconstruction unit: nodes that run alone from ``inputs`` and constants.

    Attributes:
        index: position among the blocks of the network, which run in this order.
        kind: ``plain`` is a chain of layers; ``fork`` runs from one tensor over several paths to one tensor
            (a residual unit, an attention or MLP half); ``region`` likewise from or to several tensors;
            ``joined`` is attention and MLP halves taken together; ``float`` holds an operator that has no torch
            form and no other layer.
        nodes: names of its data nodes, in topological order. Nodes that compute with shapes and constants
            alone belong to no block; every block that needs them computes them again.
        inputs: tensors that it reads from other blocks or from the caller.
        outputs: tensors that it writes for other blocks or for the caller.
        shape_inputs: tensors of which only the shape is read, in other blocks or from the caller.
        sites: every edge at which its nodes read data or weights, and the graph outputs that it writes.
    """

    index: int
    kind: BlockKind
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shape_inputs: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What quantizing one block alone does to the network's output.

    Attributes:
        block: index of the block.
        loss: L, the mean change of the output (a divergence or a relative squared error).
        squared_error: E||dz||^2 of the block's outputs, per element or per sample as asked for.
        absolute_error: E|dz|, the mean over elements.
        curvature: S = 2 L / E||dz||^2; infinite for a block whose output does not change.
        omega: S E|dz|; 0 for a block whose output does not change.
    """

    block: int
    loss: float
    squared_error: float
    absolute_error: float
    curvature: float
    omega: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Consecutive blocks that are reconstructed together. Fields as those of :class:`Block`."""

    index: int
    blocks: tuple[Block, ...]
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shape_inputs: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRank:
    """The low-rank correction that was merged into the weight of one layer.

    Attributes:
        weight: the weight tensor.
        rank: of the correction.
        candidates, shares: ranks that were tried, and softmax(alpha) of each at the end of the search; one
            candidate where there was no search.
        before, after: noise over signal of the layer's output with the float weight rounded to nearest, and with
            the weight of the solution. Both read what the layers in front compute in the end.
    """

    weight: str
    rank: int
    candidates: tuple[int, ...]
    shares: tuple[float, ...]
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOutcome:
    """What reconstruction did to a pack of ``blocks`` blocks.

    ``before`` and ``after`` are noise over signal of the pack's outputs, on the samples that judge: with weights
    rounded to nearest, and at the end. ``steps`` gradient steps were taken. ``ranks`` are there where weights were
    learnt through low-rank corrections.
    """

    pack: int
    blocks: int
    before: float
    after: float
    steps: int
    ranks: tuple[LayerRank, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One graph input: an unknown dimension is None, a symbolic one its name."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


class Feeds(Protocol):
    """Input samples that can be read again and again, always in the same order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...

    @property
    def fingerprint(self) -> str:
        """A hash of the contents and of how they are read."""
        ...

    @property
    def description(self) -> str:
        """One line for the summary: what was read and how."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNode:
    """A node of the user's file and what became of it.

    Attributes:
        name, op: its name (of an unnamed node: the one that it is given) and operator type.
        outputs: the tensors that it writes.
        homes: the nodes of the canonical graph that compute what it computed; empty where nothing is left of it.
        reason: why nothing is left.
    """

    name: str
    op: str
    outputs: tuple[str, ...]
    homes: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CanonicalModel:
    """A float model cleaned to the form that every later stage expects.

    ``graph`` is shared by all readers and never edited in place: writers work on ``graph.copy()``.
    ``path`` is the same graph on disk, with external data beside it where it is large. ``half_bytes`` of
    ``source_bytes`` are constants of half precision, which take twice as much here. ``source`` is the user's file,
    ``source_sha256`` the digest of its contents (``fingerprint`` tells forms of it apart as well),
    and ``renamed_source`` a copy of it that onnxruntime takes where it refuses the names of its nodes.
    ``outputs`` are the user's. ``selected`` of them lie behind a selection; ``graph`` has as outputs of its own what
    lies in front of it, ``boundary`` (see :mod:`onnxptq.graph.boundary`).
    """

    path: Path
    graph: gs.Graph
    source: Path
    source_bytes: int
    fingerprint: str
    opset: int
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    user_names: Mapping[str, str]
    node_metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    model_metadata: Mapping[str, str] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()
    half_bytes: int = 0
    user_nodes: tuple[UserNode, ...] = ()
    renamed_source: Path | None = None
    source_sha256: str = ""
    selected: tuple[str, ...] = ()
    boundary: tuple[str, ...] = ()

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the outputs of ``graph`` by which solutions are compared: all that are not behind a selection."""
        kept = tuple(name for name in self.outputs if name not in self.selected)
        return (*kept, *self.boundary) or self.outputs

    @property
    def reference(self) -> Path:
        """The user's network as a file that onnxruntime takes."""
        return self.renamed_source or self.source

    def user_name(self, tensor: str) -> str:
        """The name that the user's own file gives to ``tensor`` (itself where it has none)."""
        return self.user_names.get(tensor, tensor)

    def node_labels(self) -> Mapping[str, str]:
        """What reports call the nodes that preparation made: by the user's node that they are part of, too."""
        own = {node.name for node in self.user_nodes}
        return {
            home: f"{home} (part of {node.name})"
            for node in self.user_nodes
            for home in node.homes
            if home not in own
        }


class Progress(Protocol):
    """Where a stage tells how far it is. The command line draws bars; the default draws nothing."""

    def start(self, title: str, total: int) -> Callable[[], None]:
        """Announce ``total`` steps of work; the returned function marks one step as done."""
        ...

    def message(self, text: str) -> None:
        """Say one line."""
        ...


def started(progress: Progress | None, title: str, total: int) -> Callable[[], None]:
    """``progress.start``, or nothing where nobody listens or there is nothing to do."""
    return progress.start(title, total) if progress and total else lambda: None
