"""Choosing nodes and tensors by pattern.

A pattern is an operator type (``Conv``), a shell pattern over names (``*/attn/*``), or a regular expression
over names after ``re:`` (``re:blocks\\.[0-3]\\.``). Names are the user's own: those of nodes, and of the
tensors that nodes write. A pattern that matches nothing is an error, never an empty choice.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from onnxptq.errors import SelectorError


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """A predicate on names.

    Raises:
        SelectorError: ``re:`` is followed by an invalid expression.
    """
    if not pattern.startswith("re:"):
        return lambda name: name == pattern or fnmatch.fnmatchcase(name, pattern)
    try:
        expression = re.compile(pattern[3:])
    except re.error as error:
        raise SelectorError(
            f"'{pattern}' is not a valid regular expression: {error}.",
            "Correct it, or drop 're:' for a shell pattern such as 'head*'.",
        ) from error
    return lambda name: expression.search(name) is not None


def match_nodes(
    pattern: str, names: Mapping[str, Iterable[str]], op_types: Mapping[str, str], *, option: str
) -> frozenset[str]:
    """The nodes that ``pattern`` selects.

    Args:
        names: for every node, the names a user may know it by.
        op_types: for every node, its operator type.
        option: the option that holds the pattern, for the error.

    Raises:
        SelectorError: nothing matches.
    """
    matches = compile_pattern(pattern)
    found = frozenset(
        node for node, known in names.items() if op_types[node] == pattern or any(map(matches, known))
    )
    if not found:
        candidates = sorted({*op_types.values(), *(name for known in names.values() for name in known)})
        raise _no_match(pattern, candidates, option)
    return found


def match_tensors(pattern: str, names: Sequence[str], *, option: str) -> frozenset[str]:
    """The names that ``pattern`` selects.

    Raises:
        SelectorError: nothing matches.
    """
    matches = compile_pattern(pattern)
    found = frozenset(name for name in names if matches(name))
    if not found:
        raise _no_match(pattern, names, option)
    return found


def _no_match(pattern: str, candidates: Sequence[str], option: str) -> SelectorError:
    core = pattern.removeprefix("re:").strip("*")
    lowered = {name.lower(): name for name in candidates}
    near = [lowered[n] for n in difflib.get_close_matches(core.lower(), list(lowered), n=4, cutoff=0.5)]
    near += [name for name in candidates if core and core.lower() in name.lower() and name not in near][
        : 4 - len(near)
    ]
    hint = f"Near matches: {', '.join(near)}." if near else "Run 'onnxptq inspect' to list the model's names."
    return SelectorError(f"{option} '{pattern}' matches no operator type and no name in the model.", hint)
