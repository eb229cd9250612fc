"""Which channels must share one factor: a union-find over literals.

Every channel that a producer can rescale freely gets a variable ``v`` with two literals, ``2v`` for the
factor ``s_v`` and ``2v + 1`` for its inverse ``1 / s_v``. Joining literals joins their inverses too; a class
that meets its own inverse has ``s = 1 / s``, so ``s = 1``. A class can be pinned to 1 for a stated reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Literals = npt.NDArray[np.int64]


class Classes:
    """Variables, their equivalence, and the reasons of those that are pinned."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._resolved: Literals | None = None
        self._reasons: dict[int, str] = {}

    def fresh(self, shape: Sequence[int]) -> Literals:
        """New free variables, as positive literals of the given shape."""
        self._resolved = None
        start = len(self._parent)
        count = int(np.prod(shape, dtype=np.int64))
        self._parent.extend(range(start, start + 2 * count))
        return (start + 2 * np.arange(count, dtype=np.int64)).reshape(shape)

    def fixed(self, rank: int, reason: str) -> Literals:
        """One new pinned variable, broadcastable against any shape of ``rank``."""
        literals = self.fresh((1,) * rank)
        self.pin(literals, reason)
        return literals

    def pin(self, literals: Literals, reason: str) -> None:
        """Hold the factors of ``literals`` at 1. The first reason of a class is kept."""
        for literal in np.unique(literals).tolist():
            for side in (literal, literal ^ 1):
                self._reasons.setdefault(self.find(side), reason)

    def join(self, left: Literals, right: Literals) -> None:
        """Make the factors of ``left`` and ``right`` equal, element by element after broadcasting."""
        a, b = np.broadcast_arrays(left, right)
        count = len(self._parent)
        for pair in np.unique(a.reshape(-1) * count + b.reshape(-1)).tolist():
            first, second = divmod(pair, count)
            self._join(first, second)
            self._join(first ^ 1, second ^ 1)
            if self.find(first) == self.find(first ^ 1):
                self._reasons.setdefault(self.find(first), "its factor would have to equal its own inverse")

    def _join(self, a: int, b: int) -> None:
        root, other = sorted((self.find(a), self.find(b)))
        if root != other:
            self._resolved = None
            self._parent[other] = root
            reason = self._reasons.pop(other, None)
            if reason is not None:
                self._reasons.setdefault(root, reason)

    def find(self, literal: int) -> int:
        """The representative of the class of ``literal``."""
        parent = self._parent
        while parent[literal] != literal:
            parent[literal] = parent[parent[literal]]
            literal = parent[literal]
        return literal

    def roots(self, literals: Literals) -> Literals:
        """Representatives of every element."""
        if self._resolved is None:
            table = np.array(self._parent, dtype=np.int64)
            while not np.array_equal(above := table[table], table):
                table = above
            self._resolved = table
        return self._resolved[literals]

    def is_pinned(self, root: int) -> bool:
        """Whether the class with representative ``root`` is held at 1."""
        return root in self._reasons

    def reason(self, root: int) -> str:
        """Why the class is pinned; empty if it is free."""
        return self._reasons.get(root, "")

    def all_pinned(self, literals: Literals) -> bool:
        """Whether every element is held at 1."""
        return all(self.find(literal) in self._reasons for literal in np.unique(literals).tolist())

    def factors(self, literals: Literals, exponents: Mapping[int, float]) -> npt.NDArray[np.float64]:
        """``s`` of every element, for ln s by variable (:func:`variable_of`); absent ones are 1."""
        logs = np.zeros(len(self._parent))
        variables = np.fromiter(exponents.keys(), np.int64, len(exponents))
        logs[2 * variables] = np.fromiter(exponents.values(), np.float64, len(exponents))
        logs[2 * variables + 1] = -logs[2 * variables]
        return np.exp(logs[self.roots(literals)])


def variable_of(root: int) -> tuple[int, float]:
    """The variable that stands for a class, and whether the class has its factor (1) or the inverse (-1).

    A representative is the smallest literal of its class, so a class and its inverse have the same variable.
    """
    return root // 2, 1.0 if root % 2 == 0 else -1.0
