"""Rewrites of the canonical graph, one per file; each proves output equality in its test."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs

PASSES: tuple[Callable[[gs.Graph], int], ...] = ()
"""All rewrites in the order in which they run."""
