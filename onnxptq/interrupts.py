"""Where Ctrl-C and the polite kill may stop the program: anywhere but inside an import.

Native code that is interrupted while it loads may abort, and libraries that run code in class bodies may take the
interruption for a fault of that code. So what comes during an import is asked about again by a timer until the import
is done. This module is loaded before all else and imports nothing that takes time.
"""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_AGAIN_SECONDS = 0.02
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def begin() -> None:
    """From now on both signals raise KeyboardInterrupt, outside imports. One that is ignored stays so: shells start
    background jobs like that."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def end() -> None:
    """From now on they change nothing: what is left to do is to tidy up, and the exit code is known."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(_: int, frame: FrameType | None) -> None:
    if _is_import(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
        return
    raise KeyboardInterrupt


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
