"""Tensors that are needed again and again, in memory as far as a budget goes and in files beyond it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import torch


class Vault:
    """Hands back every tensor that it is given, or a copy of it that lives in a file.

    A file has no name any more once its tensor exists: its space is free as soon as nobody holds the tensor.

    Args:
        budget: bytes of tensors to leave in memory. They are counted when they come and not when they go, so
            call ``forget`` for what is no longer held, once and before it is gone.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._budget = budget
        self._sizes: dict[int, int] = {}
        self._held = 0

    def keep(self, value: torch.Tensor) -> torch.Tensor:
        """``value``, or its equal in a file.

        Raises:
            OSError: the folder has no room.
        """
        size = value.numel() * value.element_size()
        if size == 0:
            return value
        if self._held + size <= self._budget:
            self._sizes[id(value)] = size
            self._held += size
            return value
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".values", delete=False) as file:
            name = Path(file.name)
        try:
            value.contiguous().numpy().tofile(name)
            stored = torch.from_file(str(name), shared=True, size=value.numel(), dtype=value.dtype)
        finally:
            # Some systems keep the names of files in use; the folder goes at the end of the run.
            with suppress(OSError):
                name.unlink()
        return stored.reshape(value.shape)

    @property
    def spare(self) -> int:
        """Bytes of the budget that are not taken."""
        return max(0, self._budget - self._held)

    def forget(self, value: torch.Tensor) -> None:
        """Take a tensor off the account, if it is one that was left in memory."""
        self._held -= self._sizes.pop(id(value), 0)
