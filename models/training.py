"""Training a small classifier from scratch: seeded, on one thread, the same weights on the same machine.

AdamW with a learning rate that rises for the first fifth of the steps and falls along a cosine (Smith and
Topin, "Super-Convergence", 2018).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models import digits
from models.digits import Digits
from models.exporting import publish, traced
from models.manifest import RepositoryFile
from models.program import run_program
from onnxptq.errors import OutputPathError

Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""Other samples of the same classes: (samples, source of chance) -> samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedManifest:
    """One reference model whose weights were trained here.

    ``accuracy`` is the share of the held-out digits that the stored weights recognise.
    """

    name: str
    form: digits.Form
    weights: RepositoryFile
    input_name: str
    input_shape: tuple[int | str, ...]
    output_name: str
    output_shape: tuple[int | str, ...]
    opset: int
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast."""

    epochs: int
    batch: int = 32
    rate: float = 3e-3
    decay: float = 0.02
    rise: float = 0.2
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A reference model that is trained here: what it is, and how its weights came about.

    ``make`` gives the network without its weights.
    """

    manifest: TrainedManifest
    make: Callable[[], torch.nn.Module]
    augment: Augment
    schedule: Schedule

    def load_torch(self) -> torch.nn.Module:
        """The trained network in evaluation mode.

        Raises:
            EnvironmentMismatchError: the weights are absent or not the expected ones.
        """
        return load_weights(self.make(), self.manifest.weights)

    def build(self, output: Path) -> Path:
        """Export the network to ``output``, compare it with torch in onnxruntime, and return ``output``.

        Nothing is left at ``output`` unless every check passed; a file already there is replaced at once.

        Raises:
            EnvironmentMismatchError: the weights are absent or not the expected ones.
            OutputCheckError: the exported file does not compute what the torch network computes.
            OutputPathError: the folder of ``output`` cannot be written.
        """
        network = self.load_torch()
        return publish(traced(network, self.manifest), network, self.manifest, output)

    def main(self, arguments: list[str]) -> int:
        """The command line of the model's module; returns the exit code."""
        usage = f"{self.manifest.name} OUT.onnx | --train OUT.npz"
        if arguments[:1] == ["--train"]:
            return run_program(usage, self._train, arguments[1:])
        return run_program(usage, self._export, arguments)

    def _export(self, output: Path) -> str:
        path = self.build(output)
        return f"{path}: {path.stat().st_size / 1e6:.2f} MB, checked against torch"

    def _train(self, output: Path) -> str:
        """Write new weights, and say how good they are."""
        form = self.manifest.form
        network = train(self.make, digits.load(form, "calib"), self.augment, self.schedule, print)
        save_weights(network, output)
        sha256 = hashlib.sha256(output.read_bytes()).hexdigest()
        stored = RepositoryFile(relative_path=str(output.resolve()), sha256=sha256)
        reached = accuracy(load_weights(self.make(), stored), digits.load(form, "heldout"))
        return f"{output}: sha256 {sha256}, recognises {reached:.4f} of the held-out digits"


def train(
    make: Callable[[], torch.nn.Module],
    digits: Digits,
    augment: Augment,
    schedule: Schedule,
    say: Callable[[str], None] = lambda _: None,
) -> torch.nn.Module:
    """A network of ``make`` trained on ``digits``, in evaluation mode; ``say`` hears of every tenth epoch."""
    samples, labels = torch.from_numpy(digits.samples), torch.from_numpy(digits.labels)
    batches = len(labels) // schedule.batch
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        chance = torch.Generator().manual_seed(schedule.seed)
        network = make().train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=schedule.rate, weight_decay=schedule.decay)
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, schedule.rate, total_steps=schedule.epochs * batches, pct_start=schedule.rise
        )
        for epoch in range(1, schedule.epochs + 1):
            order = torch.randperm(len(labels), generator=chance)[: batches * schedule.batch]
            total = 0.0
            for rows in order.reshape(batches, schedule.batch):
                logits = network(augment(samples[rows], chance))
                loss = torch.nn.functional.cross_entropy(logits, labels[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                rates.step()
                total += loss.item()
            if epoch % 10 == 0 or epoch == schedule.epochs:
                say(f"epoch {epoch} of {schedule.epochs}: loss {total / batches:.3f}")
    return network.eval()


def accuracy(network: torch.nn.Module, digits: Digits) -> float:
    """The share of ``digits`` that ``network`` recognises."""
    with torch.inference_mode():
        found = network(torch.from_numpy(digits.samples)).argmax(1).numpy()
    return float((found == digits.labels).mean())


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """Parameters and running statistics in half precision, which halves the file; the same weights, the same bytes.

    Raises:
        OutputPathError: ``path`` cannot be written.
    """
    halves = {
        name: value.numpy().astype(np.float16)
        for name, value in network.state_dict().items()
        if value.dtype == torch.float32
    }
    try:
        np.savez_compressed(path, allow_pickle=False, **halves)
    except OSError as error:
        raise OutputPathError(
            f"Cannot write {path}: {error}", "Choose a file that can be written."
        ) from error


def load_weights(network: torch.nn.Module, file: RepositoryFile) -> torch.nn.Module:
    """``network`` with the weights that :func:`save_weights` wrote, in evaluation mode.

    Raises:
        EnvironmentMismatchError: the file is absent, or not the expected one.
        KeyError: the file is of another network.
    """
    with np.load(file.locate()) as stored:
        state = {name: torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files}
    own = network.state_dict()
    unknown = sorted(
        name for name, value in own.items() if value.dtype == torch.float32 and name not in state
    )
    if unknown:
        raise KeyError(f"{file.relative_path} has no {unknown[0]!r}")
    network.load_state_dict({**own, **state})
    return network.eval()


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of sums, and so the weights, would depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
