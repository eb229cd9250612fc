"""The search for ranks: who is asked what, and who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from onnxptq.quantizers.low_rank import Factors, LowRankWeight
from onnxptq.reconstruct import rank_search
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.low_rank import correct_pack
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.rank_search import RankChoice, choose_ranks
from tests.unit.reconstruct.pack_cases import Case, case, chain, spied

SEARCH = Learning(weights="low-rank", ranks=(1, 3, 6, 50), search_steps=12, batch=4, steps=20, held_out=0.0)


@pytest.fixture
def made(tmp_path: Path) -> Case:
    return case(chain(2), tmp_path, samples=17, longest=99, weight_bits=4, activation_bits=3)


def _quantizers(
    made: Case, data: PackData, terms: Mapping[str, Sequence[Factors]], settings: Learning
) -> PackQuantizers:
    return PackQuantizers(
        made.index,
        made.packs[0],
        data.module,
        made.plan,
        made.start,
        settings,
        settled=frozenset(),
        corrections=terms,
    )


def _corrections(made: Case, rank: int = 50) -> Mapping[str, Factors]:
    return correct_pack(
        made.index, made.packs[0], made.plan, made.start, made.data(), rank=rank, settled=frozenset()
    )[1]


def _chosen(made: Case, settings: Learning, seed: int = 0) -> Mapping[str, RankChoice]:
    data = made.data()
    generator = torch.Generator().manual_seed(seed)
    return choose_ranks(
        _corrections(made), lambda terms: _quantizers(made, data, terms, settings), data, settings, generator
    )


def test_candidates_end_at_the_size_of_the_layer(made: Case) -> None:
    found = _chosen(made, SEARCH)
    assert {c.candidates for name, c in found.items() if name != "last.w"} == {(1, 3, 6, 12)}
    assert found["last.w"].candidates == (1, 3, 5)
    for choice in found.values():
        assert sum(choice.shares) == pytest.approx(1.0)
        assert choice.factors.rank == choice.candidates[int(np.argmax(choice.shares))]


def test_without_steps_or_choice_it_is_the_largest(made: Case) -> None:
    for settings in (replace(SEARCH, search_steps=0), replace(SEARCH, ranks=(99,))):
        for name, choice in _chosen(made, settings).items():
            assert choice.candidates == (5 if name == "last.w" else 12,)
            assert choice.shares == (1.0,)
            assert choice.factors.rank == choice.candidates[0]


def test_the_same_seed_gives_the_same_shares(made: Case) -> None:
    first, again, other = (
        {name: choice.shares for name, choice in _chosen(made, SEARCH, seed).items()} for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_candidate_that_harms_loses(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form against noise of the same rank that may not learn."""
    monkeypatch.setattr(rank_search, "ALPHA_RATE", 0.2)
    rng = np.random.default_rng(0)
    terms = {}
    for name, good in _corrections(made, rank=3).items():
        noise = replace(good, left=rng.standard_normal(good.left.shape).astype(np.float32))
        # As large as the weights themselves.
        size = np.float32(0.3 / np.sqrt(np.square(noise.product()).mean()))
        terms[name] = [replace(noise, left=size * noise.left), good]
    data = made.data()
    settings = replace(SEARCH, latent_rate=0.0, search_steps=30)
    learned = _quantizers(made, data, terms, settings)
    shares = rank_search._searched(learned, data, settings, torch.Generator().manual_seed(0))
    assert all(good > 0.8 for _, good in shares.values())


def test_the_halves_do_not_mix(made: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates learn from one half of the samples and alpha from the other; dropping is for the candidates."""
    spy = spied(made.data())
    kept: list[torch.Tensor] = []
    terms = {name: [f.truncated(2), f] for name, f in _corrections(made).items()}
    learned = _quantizers(made, spy, terms, SEARCH)
    weights = [w for w in learned.weights.values() if isinstance(w, LowRankWeight)]
    before = [[p.detach().clone() for p in w.parameters()] for w in weights]
    step = torch.optim.Adam.step

    def seen(self: torch.optim.Adam) -> None:
        kept.append(torch.stack([w.kept for w in weights]))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", seen)
    rank_search._searched(learned, spy, replace(SEARCH, search_steps=40), torch.Generator().manual_seed(0))
    taught, judged = ({i for chosen in spy.steps[place::2] for i in chosen} for place in (0, 1))
    assert taught | judged == set(range(17))
    assert not taught & judged
    assert len(taught) == 9
    assert any(bool((k == 0).any()) for k in kept[::2])
    assert all(bool((k == 1).all()) for k in kept[1::2])
    for weight, old in zip(weights, before, strict=True):
        for (name, parameter), value in zip(weight.named_parameters(), old, strict=True):
            is_searched = name.startswith(("left", "right", "alpha"))
            assert torch.equal(parameter, value) != is_searched, name
