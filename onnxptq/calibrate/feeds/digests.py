"""What a sample is known by: a hash of its contents, whatever file or object it came from."""

from __future__ import annotations

import hashlib

import numpy as np

from onnxptq.types import Sample


def digest(sample: Sample) -> bytes:
    """sha256 over names, types, shapes and values."""
    hasher = hashlib.sha256()
    for name in sorted(sample):
        values = sample[name]
        hasher.update(f"{name}\0{values.dtype}\0{values.shape}\0".encode())
        # The bytes of objects are addresses.
        is_text = values.dtype.hasobject
        hasher.update(repr(values.tolist()).encode() if is_text else np.ascontiguousarray(values).tobytes())
    return hasher.digest()
