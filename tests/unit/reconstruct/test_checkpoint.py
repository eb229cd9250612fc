"""Finished packs on disk: what is damaged is absent, and going on gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxptq.packing import solve_by_packs
from onnxptq.recipe import Recipe
from onnxptq.reconstruct import packwise
from onnxptq.reconstruct.checkpoint import Checkpoints, Finished
from onnxptq.reconstruct.learning import Learning
from onnxptq.types import Branch, LayerRank, PackOutcome, PerTensor, QParams, QType, Solution
from tests.unit.reconstruct.pack_cases import Case, case, chain

LEARNING = Learning(steps=6, batch=4)
RANK = LayerRank(weight="w", rank=2, candidates=(1, 2), shares=(0.25, 0.75), before=0.1, after=0.05)


PLAIN = QType.unsigned(4)
SHIFTED = QType(bits=4, qmin=0, qmax=15, storage="int8")


def _qparams(scale: float, zero_point: int = 3, qtype: QType = PLAIN) -> QParams:
    return QParams(
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(zero_point, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )


def _saved(folder: Path) -> tuple[Checkpoints, Solution, Finished, Path]:
    old = Branch(down=np.ones((2, 1), np.float32), up=np.ones((1, 2), np.float32), before=0.5, after=0.25)
    before = Solution(
        qparams={"a": _qparams(1.0), "b": _qparams(2.0)}, weights={"u": np.ones(3)}, branches={"n": old}
    )
    found = Finished(
        solution=Solution(
            qparams={**before.qparams, "b": _qparams(0.1, -3, SHIFTED)},
            weights={**before.weights, "w/ü.1": np.arange(6, dtype=np.float32).reshape(2, 3)},
            branches={**before.branches, "ü/n.1": replace(old, up=old.up * np.float32(0.1), after=0.125)},
        ),
        settled=frozenset({"old", "b"}),
        outcome=PackOutcome(pack=4, blocks=2, before=0.5, after=0.1, steps=7, ranks=(RANK,)),
    )
    store = Checkpoints(folder)
    store.save(4, before, {"old"}, found)
    (path,) = folder.iterdir()
    return store, before, found, path


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    store, before, found, _ = _saved(tmp_path / "packs")
    known = store.load(4, before, {"old"})
    assert known is not None
    assert known.settled == found.settled
    assert known.outcome == found.outcome
    assert known.solution.qparams["a"] is before.qparams["a"]
    new = known.solution.qparams["b"]
    assert (new.scale, new.zero_point, new.qtype) == (np.float32(0.1), -3, SHIFTED)
    assert new.scale.dtype == np.float32
    np.testing.assert_array_equal(known.solution.weights["w/ü.1"], found.solution.weights["w/ü.1"])
    assert known.solution.weights["u"] is before.weights["u"]
    assert known.solution.branches["n"] is before.branches["n"]
    one, two = known.solution.branches["ü/n.1"], found.solution.branches["ü/n.1"]
    assert (one.before, one.after) == (two.before, two.after)
    np.testing.assert_array_equal(one.down, two.down)
    np.testing.assert_array_equal(one.up, two.up)
    assert store.load(5, before, {"old"}) is None


def test_a_file_that_was_cut_off_is_absent(tmp_path: Path) -> None:
    store, before, _, path = _saved(tmp_path)
    contents = path.read_bytes()
    for length in {0, 1, 31, 32, 33, 100, len(contents) // 2, len(contents) - 1}:
        path.write_bytes(contents[:length])
        assert store.load(4, before, {"old"}) is None
    path.write_bytes(contents + b"\0")
    assert store.load(4, before, {"old"}) is None
    path.write_bytes(contents)
    assert store.load(4, before, {"old"}) is not None


def test_a_file_with_a_wrong_byte_anywhere_is_absent(tmp_path: Path) -> None:
    store, before, _, path = _saved(tmp_path)
    contents = path.read_bytes()
    for place in range(0, len(contents), 7):
        path.write_bytes(contents[:place] + bytes([contents[place] ^ 0x41]) + contents[place + 1 :])
        assert store.load(4, before, {"old"}) is None, place


def test_saving_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(KeyboardInterrupt):
        _saved(tmp_path / "packs")
    assert list((tmp_path / "packs").iterdir()) == []


def _bytes(found: packwise.Reconstruction) -> list[object]:
    solution = found.solution
    weights: list[object] = [solution.weights[n].tobytes() for n in sorted(solution.weights)]
    scales = [solution.qparams[i].scale.tobytes() for i in sorted(solution.qparams)]
    return [*weights, *scales, found.outcomes]


@pytest.mark.parametrize("settings", [LEARNING, replace(LEARNING, steps=0)], ids=["learnt", "fast"])
@pytest.mark.parametrize("target", ["simulate", "ort-cpu"])
def test_a_run_goes_on_behind_its_last_finished_pack(
    settings: Learning, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = case(chain(3), tmp_path, target=target, samples=9)
    wanted = _bytes(made.solved(settings))
    real, done = packwise._solved, []

    def counted(*given: Any) -> Finished:
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given)

    monkeypatch.setattr(packwise, "_solved", counted)
    for stop in range(1, len(made.packs)):
        store = Checkpoints(tmp_path / f"packs{stop}")
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            made.solved(settings, checkpoints=store)
        assert len(list((tmp_path / f"packs{stop}").iterdir())) == stop
        done[:] = [1] * stop
        before, stop = stop, 10**6
        assert _bytes(made.solved(settings, checkpoints=store)) == wanted
        # Finished packs were not solved again.
        assert len(done) == len(made.packs)
        stop = before
    # A damaged one is, and with the same result.
    next(iter(sorted((tmp_path / "packs2").iterdir()))).write_bytes(b"")
    done.clear()
    stop = 10**6
    assert _bytes(made.solved(settings, checkpoints=Checkpoints(tmp_path / "packs2"))) == wanted
    assert len(done) == 1


# ---- keys ----------------------------------------------------------------------------------------


def _folder(made: Case, recipe: Recipe) -> str:
    found = solve_by_packs(
        made.model,
        made.plan,
        made.start,
        made.samples,
        recipe,
        scratch=made.folder,
        work_dir=made.folder,
    )
    return found.checkpoints.name


RECIPE = Recipe(target="simulate", weight_bits=3, activation_bits=4, effort="fast")


def _other_data(made: Case) -> Case:
    changed = [dict(s) for s in made.samples]
    changed[-1]["x"] = changed[-1]["x"] + np.float32(1e-3)
    return replace(made, samples=changed)


def _other_batches(made: Case) -> Case:
    """The same numbers in the same order, two samples to a batch."""
    joined = [
        {"x": np.concatenate([a["x"], b["x"]])}
        for a, b in zip(made.samples[::2], made.samples[1::2], strict=True)
    ]
    return replace(made, samples=joined)


def _other_weights(made: Case) -> Case:
    weights = {"last.w": made.model.graph.tensors()["last.w"].values + np.float32(1e-3)}
    return replace(made, start=Solution(qparams=made.start.qparams, weights=weights))


def _other_ranges(made: Case) -> Case:
    qparams = dict(made.start.qparams)
    qparams["x"] = replace(qparams["x"], scale=np.asarray(qparams["x"].scale * 1.5, np.float32))
    return replace(made, start=Solution(qparams=qparams))


def _other_model(made: Case) -> Case:
    return replace(made, model=replace(made.model, fingerprint="another"))


CHANGES: Mapping[str, Callable[[Case], Case]] = {
    "data": _other_data,
    "batches": _other_batches,
    "weights": _other_weights,
    "ranges": _other_ranges,
    "model": _other_model,
}


def test_the_folder_stands_for_all_that_matters(tmp_path: Path) -> None:
    made = case(chain(1), tmp_path, samples=6)
    known = _folder(made, RECIPE)
    assert _folder(made, RECIPE) == known
    names = {known}
    for change in CHANGES.values():
        names.add(_folder(change(made), RECIPE))
    for changed in (
        {"seed": 1},
        {"effort": "balanced"},
        {"method": "brecq", "effort": "balanced"},
        {"max_memory": 512},
    ):
        names.add(_folder(made, RECIPE.updated(**changed)))
    for bits in ({"weight_bits": 4}, {"activation_bits": 5}):
        names.add(_folder(case(chain(1), tmp_path / str(bits), samples=6, **bits), RECIPE.updated(**bits)))
    assert len(names) == 1 + len(CHANGES) + 4 + 2
