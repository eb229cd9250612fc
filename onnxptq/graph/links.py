"""A model file in another folder, beside the external data that it shares with the original.

The data are hard links where the file system has them, so that their size does not matter, and copies elsewhere.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx

from onnxptq.errors import OutputPathError
from onnxptq.graph import proto
from onnxptq.graph.names import name_nodes
from onnxptq.graph.save import write_model

_LISTED = 5


def link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, else a copy of it.

    Raises:
        OutputPathError: ``target`` cannot be written.
    """
    # What an earlier run has linked must not be written into: it is the user's own file.
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise OutputPathError(
                f"{target} cannot be written: {error.strerror or error}.",
                "Check that the folder is writable and that the disk has room.",
            ) from error


def link_data(model: onnx.ModelProto, origin: Path, folder: Path) -> None:
    """Put the external data of ``model``, which lies in ``origin``, into ``folder`` as well."""
    locations = {proto.external_ref(t).location for t in proto.walk_tensors(model) if proto.is_external(t)}
    for location in sorted(locations):
        target = folder / location
        target.parent.mkdir(parents=True, exist_ok=True)
        link(origin / location, target)


def number_repeated(model: onnx.ModelProto) -> str | None:
    """Give nodes of one graph names of their own, in place: ONNX asks for none, onnxruntime refuses to load others.

    Returns:
        What was renamed; None where nothing was.
    """
    repeated = [name for graph in proto.walk_graphs(model.graph) for name in name_nodes(graph, unnamed=False)]
    if not repeated:
        return None
    names = [f"'{name}'" for name in dict.fromkeys(repeated)]
    listed = ", ".join([*names[:_LISTED], *(["..."] if len(names) > _LISTED else [])])
    return (
        f"Several nodes have one name, which onnxruntime refuses; all but the first are numbered: {listed}."
    )


def numbered_copy(path: Path, folder: Path) -> tuple[Path, str] | None:
    """A copy of the model at ``path`` that onnxruntime takes in spite of repeated names, written to ``folder``.

    Returns:
        The copy, and what was renamed; None where nothing had to be.
    """
    model = onnx.load(str(path), load_external_data=False)
    note = number_repeated(model)
    return None if note is None else (write_linked(model, path, folder), note)


def write_linked(model: onnx.ModelProto, path: Path, folder: Path) -> Path:
    """Write ``model``, a variant of the one at ``path``, to ``folder`` under the same name, its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    link_data(model, path.parent, folder)
    write_model(model, folder / path.name)
    return folder / path.name
