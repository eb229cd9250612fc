"""The processes of one run, as ``torchrun`` starts them: rank 0 leads, the others take their share of samples.

Rank 0 runs the program. The others ``serve``: they wait until it calls ``run`` with a function, and run that
function beside it. Within it every rank works on samples of its own, and what belongs together is summed,
broadcast or gathered. So everything outside such a function happens once, on rank 0, which alone writes and prints.

Ranks meet before each exchange and tell whether one of them has failed. Then all leave the function with the same
error, rank 0 reports it, and all end with its exit code. A rank that dies without a word breaks the connection,
which ends the others.

In one process (``ALONE``) nothing is exchanged and torch is not imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from onnxptq.errors import EnvironmentMismatchError, OnnxPtqError
from onnxptq.types import Array

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
P = ParamSpec("P")

_PATIENCE = timedelta(days=30)
"""Ranks wait for one that works on its own; one that is gone is noticed at once."""


class LostRankError(OnnxPtqError):
    """Another process of the run is gone."""


class _Told(Exception):  # noqa: N818 - it carries an error, which may be of another rank, out of the function
    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Ranks:
    """One process among ``size``, its number being ``rank``. ``is_intact`` unless one was lost or interrupted within
    a shared function."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.is_intact = True

    @staticmethod
    def join() -> Ranks:
        """The ranks that torchrun started, or ``ALONE``.

        Raises:
            EnvironmentMismatchError: they do not find each other.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return ALONE
        import torch
        from torch import distributed

        local, here = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        has_own_device = torch.cuda.is_available() and torch.cuda.device_count() >= max(1, here)
        if torch.cuda.is_available():
            torch.cuda.set_device(local % torch.cuda.device_count())
        is_nccl = has_own_device and distributed.is_nccl_available()
        try:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if is_nccl else "gloo", timeout=_PATIENCE)
        except Exception as error:
            raise EnvironmentMismatchError(
                f"The processes that torchrun started do not find each other: {error}",
                "Check torchrun's --nnodes, --rdzv-endpoint and --master-addr.",
            ) from error
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    # ---- one function on all ranks --------------------------------------------------------------------

    def run(self, function: Callable[Concatenate[Ranks, P], T], *shared: P.args, **own: P.kwargs) -> T:
        """``function(ranks, *shared, **own)`` here, beside ``function(ranks, *shared)`` on every other rank.

        Called on rank 0. ``function`` is one of a module; ``shared`` can be pickled, ``own`` need not.

        Raises:
            Exception: what it raised on the first of the ranks where it failed.
        """
        if self.size == 1:
            return function(self, *shared, **own)
        self.broadcast(pickle.dumps((function, shared)))
        return self._beside_others(lambda: function(self, *shared, **own))

    def serve(self) -> int:
        """Take part in every ``run`` of rank 0; returns the exit code that it ends with."""
        try:
            while True:
                order: Any = self.broadcast(None)
                if isinstance(order, int):
                    return order
                with _untold():
                    self._beside_others(functools.partial(self._obey, order))
        except LostRankError as error:
            return error.exit_code
        finally:
            _distributed().destroy_process_group()

    def dismiss(self, code: int) -> None:
        """Let the other ranks end with ``code``. Called on rank 0, at the end."""
        if self.size == 1:
            return
        # After an interruption nobody knows what the others wait for: they will notice that this one is gone.
        if self.is_intact:
            with contextlib.suppress(LostRankError):
                self.broadcast(code)
        _distributed().destroy_process_group()

    def _obey(self, order: bytes) -> None:
        # Unpacked here, where the others hear of it if that fails.
        function, shared = pickle.loads(order)
        function(self, *shared)

    def _beside_others(self, work: Callable[[], T]) -> T:
        self.is_intact = False
        try:
            found = work()
            self.barrier()
        except _Told as told:
            self.is_intact = True
            raise told.error from None
        except LostRankError:
            raise
        except Exception as error:
            try:
                self._meet(error)
            except _Told as told:
                self.is_intact = True
                raise told.error from error
            raise
        self.is_intact = True
        return found

    # ---- exchanges within it --------------------------------------------------------------------------

    def share(self, count: int, unit: int = 1, *, rank: int | None = None) -> Sequence[int]:
        """Which of ``count`` samples are of this rank (or of ``rank``): every so manieth run of ``unit`` samples."""
        rank = self.rank if rank is None else rank
        return [i for i in range(count) if i // unit % self.size == rank]

    def barrier(self) -> None:
        """Wait for all ranks; where one has failed, fail with it."""
        if self.size > 1:
            self._meet(None)

    def sum(self, values: Array) -> Array:
        """The sum of ``values`` over the ranks, in their own type; the same bits on every rank. It may reuse
        their memory."""
        if self.size == 1:
            return values
        import torch

        own = torch.from_numpy(np.ascontiguousarray(values))
        self._add_up(own)
        return own.numpy().reshape(values.shape)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradients of ``parameters`` by their sums over the ranks; none counts as zeros."""
        if self.size == 1 or not parameters:
            return
        import torch

        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._add_up(flat)
        start = 0
        for parameter in parameters:
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()

    def broadcast(self, value: T) -> T:
        """The ``value`` of rank 0; what other ranks give is ignored."""
        return value if self.size == 1 else self._from(0, value)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks in their order, on every rank."""
        return [value] if self.size == 1 else [self._from(rank, value) for rank in range(self.size)]

    def scatter(self, parts: Sequence[T] | None) -> T:
        """The part of this rank; ``parts``, one per rank, are those of rank 0."""
        data = None
        for rank in range(1, self.size):
            sent = None if parts is None else _packed(parts[rank])
            self.barrier()
            with _connection():
                if sent is not None:
                    _distributed().send(_length(sent), rank)
                    _distributed().send(sent, rank)
                elif rank == self.rank:
                    length = _length()
                    _distributed().recv(length, 0)
                    data = _room(length)
                    _distributed().recv(data, 0)
        if parts is not None:
            return parts[0]
        assert data is not None
        return _unpacked(data)  # type: ignore[no-any-return]

    def deal(self, items: Iterable[T] | None) -> Iterator[tuple[int, T]]:
        """Items of rank 0, dealt in turn: those of this rank, with their positions. Rank 0 reads as many ahead as
        there are ranks."""
        if self.size == 1:
            assert items is not None
            yield from enumerate(items)
            return
        waiting = None if items is None else enumerate(items)
        while True:
            hands: list[tuple[int, T] | None] | None = None
            if waiting is not None:
                hands = list(islice(waiting, self.size))
                hands += [None] * (self.size - len(hands))
            if not self.broadcast(hands is not None and hands[0] is not None):
                return
            own = self.scatter(hands)
            if own is not None:
                yield own

    def _add_up(self, values: torch.Tensor) -> None:
        self.barrier()
        with _connection():
            _distributed().all_reduce(values)

    def _from(self, source: int, value: Any) -> Any:
        # What cannot be packed must be found out before the others wait for it.
        data = _packed(value) if self.rank == source else None
        self.barrier()
        passed = self._pass_on(source, data)
        return value if self.rank == source else _unpacked(passed)

    def _meet(self, error: Exception | None) -> None:
        import torch

        failed = torch.zeros(self.size, dtype=torch.int32)
        failed[self.rank] = error is not None
        with _connection():
            _distributed().all_reduce(failed)
        if not failed.any():
            return
        first = int(failed.nonzero()[0])
        if error is not None and first == self.rank:
            self._pass_on(first, _packed(_portable(error)))
            raise _Told(error)
        raise _Told(_unpacked(self._pass_on(first, None)))

    def _pass_on(self, source: int, data: torch.Tensor | None) -> torch.Tensor:
        """The bytes of rank ``source``."""
        length = _length(data)
        with _connection():
            _distributed().broadcast(length, source)
            data = _room(length) if data is None else data
            _distributed().broadcast(data, source)
        return data


ALONE = Ranks()
"""A run in one process."""


def _distributed() -> Any:
    from torch import distributed

    return distributed


def _packed(value: Any) -> torch.Tensor:
    import torch

    return torch.frombuffer(bytearray(pickle.dumps(value, pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return pickle.loads(data.numpy().data)


def _length(data: torch.Tensor | None = None) -> torch.Tensor:
    import torch

    return torch.tensor([0 if data is None else len(data)])


def _room(length: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(int(length), dtype=torch.uint8)


def _portable(error: Exception) -> Exception:
    """``error`` as other processes can read it, with the place where it was raised."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """Leaves errors to rank 0, which has them too and says them."""
    try:
        yield
    except LostRankError:
        raise
    except Exception:
        return


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(
            f"Another process of this run has ended: {' '.join(str(error).split())[:200]}",
            "See what it or the system says (out of memory?); the same command continues from its caches.",
        ) from error
