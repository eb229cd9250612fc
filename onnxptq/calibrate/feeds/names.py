"""Which of the user's arrays feeds which input."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from onnxptq.calibrate.feeds.wording import listing
from onnxptq.errors import FeedError
from onnxptq.types import InputSpec

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of a data file that are taken as ground truth, unless an input has that very name."""


def match_keys(
    keys: Collection[str], inputs: Sequence[InputSpec], where: str
) -> tuple[Mapping[str, str], str]:
    """The key that feeds each input, and a note on what was not matched by name ("" where all was).

    Names match exactly; ``arr_0``, ``arr_1``, ... (numpy.savez without names) match by position; the
    only key that is no label feeds a single input.

    Raises:
        FeedError: an input has no key; lists the keys and the nearest one.
    """
    wanted = [spec.name for spec in inputs]
    missing = [name for name in wanted if name not in keys]
    if not missing:
        unused = sorted(set(keys) - set(wanted))
        return {name: name for name in wanted}, f"ignored {listing(unused)}" if unused else ""
    candidates = [key for key in keys if key not in LABEL_KEYS]
    if len(wanted) == 1 and len(candidates) == 1:
        unused = sorted(set(keys) - set(candidates))
        note = f"{candidates[0]!r} read as input {wanted[0]!r}"
        return {wanted[0]: candidates[0]}, note + (f", ignored {listing(unused)}" if unused else "")
    positional = [f"arr_{i}" for i in range(len(wanted))]
    if set(keys) == set(positional):
        return dict(zip(wanted, positional, strict=True)), "unnamed arrays read as inputs by position"
    near = difflib.get_close_matches(missing[0], list(keys), n=1)
    raise FeedError(
        f"{where}: no array for input {missing[0]!r}; it holds {listing(sorted(keys)) or 'nothing'}.",
        (f"Rename {near[0]!r} to {missing[0]!r}. " if near else "")
        + f"Keys must be the model's input names: {listing(wanted)}.",
    )


def folder_name(input_name: str) -> str:
    """``input_name`` as a folder: characters that file systems refuse become underscores."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", input_name)
