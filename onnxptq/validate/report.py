"""The report of one run: everything that a person or a program may want to know afterwards.

All names in it are the user's own. ``Report.to_json`` gives plain types under a stable schema; numbers that
JSON cannot write become the strings "inf" and "-inf", NaN becomes null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from onnxptq.types import PackOutcome, Skip
from onnxptq.validate.latency import Latency
from onnxptq.validate.metrics import OutputMetrics
from onnxptq.validate.parity import Parity

SCHEMA_VERSION = 1
"""Raised when a field of the JSON changes its meaning or goes; new fields do not raise it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The float model. ``parameters`` counts initializer elements, ``bytes`` the file with external data."""

    path: str
    fingerprint: str
    opset: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFacts:
    """The written model. ``note`` says why it is larger than the input, where it is."""

    path: str
    bytes: int
    sha256: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """What was read, how, and how many samples; ``is_random`` where they were made up, as was asked for."""

    description: str
    count: int
    is_random: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedRow:
    """One quantizer. Scale and zero point are ranges over the channels (equal ends per tensor)."""

    quantizer_id: str
    tensor: str
    role: str
    bits: int
    storage: str
    granularity: str
    symmetric: bool
    scale: tuple[float, float]
    zero_point: tuple[int, int]
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Counts in equal bins from ``low`` to ``high``."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorQuality:
    """One tensor along the network.

    ``sqnr_db`` compares its values in the quantized network with those in the float one, errors from earlier
    layers included; ``nearest_sqnr_db`` is the same with weights rounded to nearest, where packs were solved.
    ``minimum`` to ``maximum`` is its range over the calibration data, ``low`` to ``high``
    what its quantizer represents; None where there is none.
    """

    tensor: str
    position: int
    sqnr_db: float
    nearest_sqnr_db: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    low: float | None = None
    high: float | None = None
    histogram: Histogram | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """Bytes of one component of the file before (as float32) and after."""

    component: str
    before: int
    after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTime:
    """Wall-clock seconds of one stage."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScore:
    """A block, the pack that it is in, and its scores (see :class:`~onnxptq.types.Sensitivity`), None where
    packs were not chosen by scores. ``start`` and ``end`` are the tensors at its ends, in the user's names."""

    block: int
    pack: int
    start: str
    end: str
    curvature: float | None = None
    omega: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxRow:
    """A softmax output that products of activations read, and the range ``low`` to ``high`` that was written. Its
    root of order ``root`` is on a uniform grid; 1 is itself.

    The others are signal over noise of these products on calibration samples before anything is learnt, with only
    this output quantized: ``full_db`` in the range that holds all its values, ``from_zero_db`` in the best that
    begins at 0, ``free_db`` in the best of all, whether the target can have it or not.
    """

    tensor: str
    bits: int
    root: float
    low: float
    high: float
    full_db: float
    from_zero_db: float
    free_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchRow:
    """The low-rank branch beside the layer ``node`` with weight ``weight``.

    ``before`` and ``after`` are noise over signal of the layer's output without and with it, on calibration samples
    when the weight was rounded. It holds ``parameters`` in float; ``share`` is what it adds of the layer's
    multiply-adds and weights.
    """

    node: str
    weight: str
    rank: int
    before: float
    after: float
    parameters: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchFacts:
    """All branches, the bytes of their constants, and the latency of the file against the same without them."""

    rows: tuple[BranchRow, ...]
    bytes: int
    latency: Latency | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BitRow:
    """A pack and its bits; None where it quantizes no weights (or no activations) or nothing was chosen.

    ``start`` and ``end`` are the tensors at its ends, in the user's names; ``weights`` and ``activations`` count
    elements (of activations: per sample). ``weight_loss`` and ``activation_loss`` give the loss at the network's
    output per number of bits, with only these weights (activations) quantized.
    """

    pack: int
    start: str
    end: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weights: int | None = None
    activations: int | None = None
    weight_loss: Mapping[int, float] = field(default_factory=dict)
    activation_loss: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BitPlanFacts:
    """The bits of every pack, what they were chosen for, and their true averages over elements."""

    allocator: str
    budget: Mapping[str, float]
    average_weight_bits: float | None
    average_activation_bits: float | None
    expected_loss: float | None
    packs: tuple[BitRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """One run of ``quantize``.

    ``outputs`` are measured on ``heldout`` (never the calibration samples) in onnxruntime's default session;
    they are empty where there was no held-out data. ``kernels`` are the operators that onnxruntime executes
    after its own optimizations, with their counts; ``recipe`` is the request as plain types; ``versions``
    holds versions and hashes by name. ``blocks`` and ``packs`` tell how a network was solved pack by pack;
    a pack whose weights were rounded in closed form alone has no outcome; ``tuning`` is that of all packs together,
    where scales and biases were learnt on the outputs. ``softmax`` tells of ranges chosen by
    the products that read them. ``bit_plan`` is there where bits differ from pack to pack, ``branches`` where layers
    have one.
    """

    model: ModelFacts
    output: OutputFacts
    target: str
    method: str
    recipe: Mapping[str, Any]
    calibration: DataFacts
    heldout: DataFacts | None = None
    quantized: tuple[QuantizedRow, ...] = ()
    skips: tuple[Skip, ...] = ()
    tensors: tuple[TensorQuality, ...] = ()
    outputs: tuple[OutputMetrics, ...] = ()
    parity: Parity | None = None
    latency: Latency | None = None
    kernels: Mapping[str, int] | None = None
    sizes: tuple[SizeRow, ...] = ()
    stages: tuple[StageTime, ...] = ()
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()
    blocks: tuple[BlockScore, ...] = ()
    packs: tuple[PackOutcome, ...] = ()
    tuning: PackOutcome | None = None
    softmax: tuple[SoftmaxRow, ...] = ()
    bit_plan: BitPlanFacts | None = None
    branches: BranchFacts | None = None

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, strings, booleans and finite numbers, under ``schema_version``."""
        result = plain(self)
        if self.parity is not None:
            result["parity"] |= {"elements": self.parity.elements, "max_steps": plain(self.parity.max_steps)}
        return {"schema_version": SCHEMA_VERSION, **result}


def plain(value: Any) -> Any:
    """``value`` in types that JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str):  # numpy scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
