"""Every error that onnxptq raises on purpose, and the exit code that the command line gives it.

::

    OnnxPtqError                      1
    ├── UsageError                    2   the request is wrong
    │   ├── RecipeError                   a recipe or option has an illegal value
    │   ├── SelectorError                 a name or op pattern matches nothing
    │   ├── FeedError                     calibration or evaluation data cannot be used
    │   ├── OutputPathError               the output cannot be written
    │   ├── BudgetError                   a budget of bits, bytes or loss is out of reach
    │   └── EnvironmentMismatchError      a needed runtime or provider is absent
    ├── UnsupportedModelError         3   the model cannot be processed
    │   ├── InvalidModelError             unreadable, truncated, or failing the ONNX checker
    │   ├── AlreadyQuantizedError         the input holds Q/DQ or integer operators
    │   └── UnsupportedOperatorError      an operator that a requested stage cannot handle
    ├── QualityGateError              4   a quality bound given by the user is not met
    ├── TargetIllegalError            5   the deployment target refuses the request
    ├── MemoryBudgetError             6   the work does not fit the memory budget
    └── OutputCheckError              7   the written file failed its own checks; it was removed

An interrupted run (Ctrl-C) exits with 130; rerunning the same command resumes it.
"""

from __future__ import annotations

EXIT_INTERRUPTED = 130
INTERRUPTED = "Interrupted. No output was written; the same command continues from its caches."


def is_interruption(error: BaseException) -> bool:
    """Whether ``error`` is Ctrl-C, or came of it: an extension module that is interrupted while it loads raises an
    ImportError instead, and hands on the KeyboardInterrupt as its cause or context."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        if isinstance(one, KeyboardInterrupt):
            return True
        seen.add(id(one))
        pending += [one.__cause__, one.__context__]
    return False


class OnnxPtqError(Exception):
    """Base of the tree: what went wrong, and what the user can do about it.

    Args:
        message: one or two sentences naming the file, node or tensor.
        remedy: what to do; printed on its own line. May be empty.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy}" if self.remedy else self.message


class UsageError(OnnxPtqError):
    """The request itself is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or an option has an unknown key or an illegal value."""


class SelectorError(UsageError):
    """An include, exclude or override pattern matches nothing."""


class FeedError(UsageError):
    """Calibration or evaluation data cannot be read or does not fit the model's inputs."""


class OutputPathError(UsageError):
    """The output, report or work folder cannot be written."""


class BudgetError(UsageError):
    """A budget of bits, bytes or loss cannot be reached with the bits that may be chosen."""


class EnvironmentMismatchError(UsageError):
    """A runtime, provider or optional package that the request needs is absent or broken."""


class UnsupportedModelError(OnnxPtqError):
    """The model cannot be processed."""

    exit_code = 3


class InvalidModelError(UnsupportedModelError):
    """The model file is unreadable, truncated, or fails the ONNX checker."""


class AlreadyQuantizedError(UnsupportedModelError):
    """The model already holds quantization operators."""


class UnsupportedOperatorError(UnsupportedModelError):
    """A requested stage cannot handle an operator of the graph."""


class QualityGateError(OnnxPtqError):
    """A quality bound stated by the user is not met."""

    exit_code = 4


class TargetIllegalError(OnnxPtqError):
    """The deployment target refuses the requested types or placement."""

    exit_code = 5


class MemoryBudgetError(OnnxPtqError):
    """The work does not fit the stated memory budget."""

    exit_code = 6


class OutputCheckError(OnnxPtqError):
    """The written file failed its own checks (checker, loading, or parity) and was removed."""

    exit_code = 7
