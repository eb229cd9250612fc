"""onnxruntime behind one small class: requested providers are obtained or refused, never silently replaced.

Two arithmetics are offered for QDQ files:

- ``exact=True``: every QuantizeLinear/DequantizeLinear runs as written and float kernels run in
  between (``session.disable_quant_qdq``, no graph optimization): what the file *means*.
- ``exact=False``: onnxruntime's defaults, which fuse QDQ groups into integer kernels: what the file
  does in production.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx

from onnxptq.errors import EnvironmentMismatchError, InvalidModelError, OnnxPtqError
from onnxptq.runtime.refusals import label, one_line, refusal
from onnxptq.types import Array, CanonicalModel, Sample

if TYPE_CHECKING:
    import onnxruntime as ort

Provider = Literal["cpu", "cuda", "tensorrt"]
_PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


class RunError(OnnxPtqError):
    """onnxruntime failed while running a model that it had loaded."""

    exit_code = 3


def installed_runtimes() -> tuple[str, ...]:
    """Names of the onnxruntime distributions present in this environment."""
    found = []
    for name in _DISTRIBUTIONS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def require_runtime() -> None:
    """Raise EnvironmentMismatchError unless exactly one onnxruntime distribution is installed and importable.

    The CPU and GPU distributions overwrite each other's files, so having both is as broken as having none.
    """
    found = installed_runtimes()
    if len(found) > 1:
        raise EnvironmentMismatchError(
            "onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files.",
            "Run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'onnxptq[cpu]' or 'onnxptq[gpu]'.",
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise EnvironmentMismatchError(
            "onnxruntime is not installed.",
            "Run: pip install 'onnxptq[gpu]' (NVIDIA GPU) or pip install 'onnxptq[cpu]'.",
        )
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise EnvironmentMismatchError(
            f"onnxruntime cannot be imported: {one_line(error)}.",
            "Install the libraries that it misses, or another build: pip uninstall -y onnxruntime onnxruntime-gpu, "
            "then pip install 'onnxptq[cpu]' or 'onnxptq[gpu]'.",
        ) from error

    if not hasattr(onnxruntime, "InferenceSession"):
        raise EnvironmentMismatchError(
            "The installed onnxruntime is incomplete (its other distribution was probably uninstalled over it).",
            "Run: pip install --force-reinstall --no-deps with the one of onnxruntime, onnxruntime-gpu that you use.",
        )


def runtime_version() -> str:
    """Name and version of the onnxruntime in use, for reports."""
    require_runtime()
    import onnxruntime

    return f"{(installed_runtimes() or ('onnxruntime',))[0]} {onnxruntime.__version__}"


class Session:
    """A loaded model.

    Args:
        model: path of an ONNX file (external data is read from beside it), or its bytes.
        provider: where to run; an error if onnxruntime does not deliver it.
        exact: see the module's docstring.
        fused: with ``exact``, let onnxruntime fuse float operators: the same arithmetic up to float rounding,
            in a fraction of the time.
        threads: intra-op threads, 0 for onnxruntime's choice.
        tuned: let the provider measure its convolution kernels at the first run, as it does by itself. That takes
            seconds per session, and which kernel wins may change from run to run.
        optimized_path: if given, onnxruntime writes the graph it really runs there.

    ``outputs`` has the name, the type as onnxruntime writes it, and the shape of every output.

    Raises:
        EnvironmentMismatchError: no usable onnxruntime, or the provider was not obtained.
        InvalidModelError: onnxruntime cannot load the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        provider: Provider = "cpu",
        exact: bool = False,
        fused: bool = False,
        threads: int = 0,
        tuned: bool = False,
        optimized_path: Path | None = None,
    ) -> None:
        require_runtime()
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # An arena keeps its peak for ever; calibration wants memory to follow the current tensors.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        # Spinning threads would starve the observers that run between two samples.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if exact:
            if not fused:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if optimized_path is not None:
            options.optimized_model_filepath = str(optimized_path)
        self.provider = provider
        self._label = label(model)
        self._session = self._load(ort, model, options, exact=exact, tuned=tuned)
        self.input_names = tuple(i.name for i in self._session.get_inputs())
        self.outputs: Sequence[tuple[str, str, Sequence[int | str | None]]] = tuple(
            (o.name, o.type, tuple(o.shape)) for o in self._session.get_outputs()
        )
        self.output_names = tuple(name for name, _, _ in self.outputs)

    def _load(
        self, ort: Any, model: Path | bytes, options: ort.SessionOptions, *, exact: bool, tuned: bool
    ) -> Any:
        wanted = _PROVIDERS[self.provider]
        if wanted not in ort.get_available_providers():
            raise EnvironmentMismatchError(
                f"onnxruntime offers no {wanted} (it has {', '.join(ort.get_available_providers())}).",
                "Install onnxptq[gpu] on a machine with an NVIDIA GPU, or ask for --provider cpu.",
            )
        providers: list[Any] = [wanted] if self.provider == "cpu" else [wanted, _PROVIDERS["cpu"]]
        if self.provider == "cuda":
            settings = {} if tuned else {"cudnn_conv_algo_search": "HEURISTIC"}
            if exact:
                # By default products of float32 are taken with 10 bits of mantissa.
                settings["use_tf32"] = "0"
            providers[0] = (wanted, settings)
        source = str(model) if isinstance(model, Path) else model
        try:
            session = ort.InferenceSession(source, options, providers=providers)
        except Exception as error:  # onnxruntime raises a dozen unrelated types
            raise refusal(model, error) from error
        if wanted not in session.get_providers():
            raise EnvironmentMismatchError(
                f"{wanted} was requested but onnxruntime fell back to {', '.join(session.get_providers())}.",
                "Check the CUDA/TensorRT libraries that this onnxruntime needs, or ask for --provider cpu.",
            )
        return session

    def run(self, feed: Sample, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run one feed and return the named outputs (all of them by default)."""
        names = self.output_names if outputs is None else tuple(outputs)
        if not names:  # onnxruntime would take an empty list for all of them
            return {}
        try:
            values = self._session.run(list(names), dict(feed))
        except Exception as error:
            raise RunError(f"onnxruntime failed while running {self._label}: {one_line(error)}") from error
        return dict(zip(names, values, strict=True))


def require_loadable(model: CanonicalModel, provider: Provider = "cpu") -> None:
    """Load the user's network, and forget it.

    Raises:
        InvalidModelError: onnxruntime cannot load it.
    """
    try:
        Session(model.reference, provider=provider)
    except InvalidModelError as error:
        told = error.message.replace(str(model.reference), str(model.source))
        raise InvalidModelError(told, error.remedy) from error


def count_kernels(model: Path, work_dir: Path) -> Mapping[str, int]:
    """Operators that onnxruntime's CPU provider really executes for ``model``, after its default optimizations."""
    optimized = work_dir / "onnxruntime_optimized.onnx"
    data = work_dir / "onnxruntime_optimized.onnx.data"
    try:
        Session(model, optimized_path=optimized)
        graph = onnx.load(str(optimized), load_external_data=False).graph
        return dict(sorted(Counter(node.op_type for node in graph.node).items()))
    finally:
        optimized.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
