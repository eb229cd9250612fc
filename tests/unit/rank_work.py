"""A second process beside the one that tests, and functions that both run."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from onnxptq.errors import MemoryBudgetError, OutputPathError
from onnxptq.graph.index import GraphIndex
from onnxptq.lowering.network import BlockNetwork
from onnxptq.ranks import Ranks
from onnxptq.reconstruct import sequential
from onnxptq.reconstruct.gram import Gram
from onnxptq.reconstruct.objective import norms_of
from onnxptq.reconstruct.pack_data import UNIT, InnerValues, PackData, run_all
from onnxptq.reconstruct.rounding import compensable_layers
from onnxptq.types import CanonicalModel, Pack, QuantPlan, Sample

SECONDS = 120


@contextmanager
def two_ranks() -> Iterator[Ranks]:
    """Rank 0 of two, in this process, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    other = multiprocessing.get_context("spawn").Process(
        target=_serve, args=({**settings, "RANK": "1", "LOCAL_RANK": "1"},)
    )
    other.start()
    before = dict(os.environ)
    os.environ.update(settings, RANK="0", LOCAL_RANK="0")
    try:
        ranks = Ranks.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield ranks
        ranks.dismiss(5)
        other.join(SECONDS)
        assert other.exitcode == 5
    finally:
        other.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _serve(settings: dict[str, str]) -> None:
    os.environ.update(settings)
    torch.set_num_threads(1)
    # As the command line ends: winding down beside torch's threads may abort.
    os._exit(Ranks.join().serve())


def exchange(ranks: Ranks, count: int, *, words: list[str] | None = None) -> dict[str, object]:
    """One of everything."""
    own = ranks.share(count, 4)
    big = np.full((3, 4), 2.0**50 if ranks.rank else 1.0)
    weight = torch.nn.Parameter(torch.ones(2, 2))
    bias = torch.nn.Parameter(torch.zeros(3))
    if ranks.rank:
        (weight.sum() * 2.0).backward()
    else:
        (weight.sum() + bias.sum() * 3.0).backward()
    ranks.sum_gradients([weight, bias])
    assert weight.grad is not None
    assert bias.grad is not None
    return {
        "own": ranks.gather(own),
        "sum": ranks.gather(ranks.sum(big)),
        "counts": ranks.sum(np.array([ranks.rank + 1, len(own)])),
        "scalar": ranks.sum(np.asarray(0.5)),
        "gradients": ranks.gather([weight.grad.numpy(), bias.grad.numpy()]),
        "broadcast": ranks.gather(ranks.broadcast(words)),
        "scatter": ranks.gather(ranks.scatter(None if words is None else [len(words), words])),
        "dealt": ranks.gather(list(ranks.deal(None if words is None else iter(words)))),
        "nothing dealt": ranks.gather(list(ranks.deal(None if words is None else []))),
    }


def fail(ranks: Ranks, where: int, when: str) -> str:
    """``where`` is the rank that fails."""
    if when == "before an exchange" and ranks.rank == where:
        raise MemoryBudgetError("too much", "less")
    ranks.sum(np.ones(2))
    for i, item in ranks.deal(range(10) if ranks.rank == 0 else None):
        if when == "while cards are dealt" and i >= 4 and ranks.rank == where:
            raise MemoryBudgetError(f"too much of {item}", "less")
    if when == "at the end" and ranks.rank == where:
        raise MemoryBudgetError("too much", "less")
    return "done"


class Unreadable:
    """What can be sent but not received."""

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return _gone, ()


def _gone() -> None:
    raise OutputPathError("The file is gone.", "Share it.")


def hand_over(ranks: Ranks, where: int) -> None:
    """``where`` tries to give away what cannot be packed."""
    ranks.gather((lambda: 1) if ranks.rank == where else 1)


class _Unspeakable(Exception):  # noqa: N818
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_oddly(ranks: Ranks) -> None:
    """With an error that cannot be pickled."""
    if ranks.rank:
        raise _Unspeakable(1, 2)


def sums(
    ranks: Ranks,
    model: CanonicalModel,
    plan: QuantPlan,
    packs: Sequence[Pack],
    samples: Sequence[Sample],
    together: int,
) -> tuple[list[list[Gram]], dict[str, float]]:
    """The sums of every layer of the first pack, and the variance of its outputs over some samples."""
    network = BlockNetwork(model.graph, packs)
    floats = [
        {name: torch.from_numpy(np.array(value)) for name, value in samples[i].items()}
        for i in ranks.share(len(samples), UNIT)
    ]
    quants = [{name: value * 0.9 for name, value in one.items()} for one in floats]
    after = run_all(network, 0, floats, together, lambda value: value)
    data = PackData(network, 0, floats, quants, after, together, ranks=ranks, count=len(samples))
    layers = compensable_layers(GraphIndex(model.graph), plan, 1000)
    own = [layer for layer in layers if layer.node.name in packs[0].nodes]
    variance = norms_of(data, range(0, len(samples), 3)).variance
    inner = InnerValues(data, sequential.SAMPLES)
    return [sequential._sums(layer, None, inner, (), ranks, has_floats=False) for layer in own], variance
