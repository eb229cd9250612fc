"""Choosing nodes and tensors by pattern.

A pattern is an operator type (``Conv``), a shell pattern over names (``*/attn/*``), or a regular expression
over names after ``re:`` (``re:blocks\\.[0-3]\\.``). Names are the user's own: those of nodes, and of the
tensors that nodes write. Types and names of the user's file that preparation has merged into other nodes choose the
nodes that took them in. A pattern that chooses nothing is an error, never an empty choice.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from onnxptq.errors import SelectorError
from onnxptq.listing import listed
from onnxptq.types import UserNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What patterns may choose from.

    Attributes:
        names: for every node, the names a user may know it by.
        op_types: for every node, its operator type.
        user_nodes: the nodes of the user's file, and what became of them.
        constants: for every constant and every input, by the user's name, the nodes that read it.
        source: the model, for advice.
    """

    names: Mapping[str, Iterable[str]]
    op_types: Mapping[str, str]
    user_nodes: Sequence[UserNode] = ()
    constants: Mapping[str, Sequence[str]] = field(default_factory=dict)
    source: str = "MODEL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a pattern chooses: ``nodes``, those ``by_name`` among them, and the user's nodes that were ``moved`` into
    nodes of another name."""

    nodes: frozenset[str]
    by_name: frozenset[str]
    moved: tuple[UserNode, ...] = ()


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


def select_nodes(pattern: str, catalogue: Catalogue, *, option: str) -> Selection:
    """The nodes that ``pattern`` chooses.

    Args:
        option: the option that holds the pattern, for the error.

    Raises:
        SelectorError: nothing matches, or nothing is left of what does.
    """
    matches = compile_pattern(pattern)
    by_type = {node for node, op in catalogue.op_types.items() if op == pattern}
    by_name = {node for node, known in catalogue.names.items() if any(map(matches, known))}
    moved: list[UserNode] = []
    gone: list[UserNode] = []
    for user in catalogue.user_nodes:
        is_named = any(map(matches, (user.name, *user.outputs)))
        if not is_named and user.op != pattern:
            continue
        homes = [home for home in user.homes if home in catalogue.op_types]
        (by_name if is_named else by_type).update(homes)
        if not homes:
            gone.append(user)
        elif user.name not in homes:
            moved.append(user)
    if not by_type | by_name:
        raise _nothing_left(pattern, gone, option) if gone else _no_match(pattern, catalogue, option)
    return Selection(nodes=frozenset(by_type | by_name), by_name=frozenset(by_name), moved=tuple(moved))


def match_tensors(pattern: str, names: Sequence[str], *, option: str) -> frozenset[str]:
    """The names that ``pattern`` selects.

    Raises:
        SelectorError: nothing matches.
    """
    matches = compile_pattern(pattern)
    found = frozenset(name for name in names if matches(name))
    if not found:
        hint = _near(pattern, names) or "No tensor that is quantized has such a name."
        raise SelectorError(f"{option} '{pattern}' matches no node and no tensor that is quantized.", hint)
    return found


def _nothing_left(pattern: str, gone: Sequence[UserNode], option: str) -> SelectorError:
    what = listed([f"'{node.name}' ({node.reason or 'it was rewritten'})" for node in gone])
    return SelectorError(
        f"{option} '{pattern}' matches only nodes of which preparation leaves nothing: {what}.",
        "Leave it out: nothing of them is quantized.",
    )


def _no_match(pattern: str, catalogue: Catalogue, option: str) -> SelectorError:
    matches = compile_pattern(pattern)
    fed = [(name, readers) for name, readers in catalogue.constants.items() if matches(name) and readers]
    if fed:
        readers = list(dict.fromkeys(f"'{reader}'" for _, some in fed for reader in some))
        return SelectorError(
            f"{option} '{pattern}' matches only what nodes read: {listed([repr(name) for name, _ in fed])}.",
            f"Name the nodes instead: {listed(readers)}.",
        )
    known = {*catalogue.op_types.values(), *(name for some in catalogue.names.values() for name in some)}
    for node in catalogue.user_nodes:
        known.update((node.op, node.name, *node.outputs))
    hint = _near(pattern, sorted(known)) or f"'onnxptq inspect {catalogue.source} --names' lists all names."
    return SelectorError(
        f"{option} '{pattern}' matches no operator type, no node, and no tensor that a node writes.", hint
    )


def _near(pattern: str, candidates: Sequence[str]) -> str:
    """Names that may have been meant, in words; empty where there are none."""
    core = pattern.removeprefix("re:").strip("*")
    lowered = {name.lower(): name for name in candidates}
    near = [lowered[n] for n in difflib.get_close_matches(core.lower(), list(lowered), n=4, cutoff=0.5)]
    near += [name for name in candidates if core and core.lower() in name.lower() and name not in near][
        : 4 - len(near)
    ]
    return f"Near matches: {', '.join(near)}." if near else ""
