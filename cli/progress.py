"""Progress bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TerminalProgress:
    """Draws what stages report; everything goes to standard error."""

    def __init__(self, *, quiet: bool, verbose: bool) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<20}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, title: str, total: int) -> Callable[[], None]:
        """Announce ``total`` steps; the returned function marks one as done."""
        if not self._bars.disable:
            task = self._bars.add_task(title, total=total)
            return lambda: self._bars.advance(task)
        if self._verbose:
            self._console.print(f"{title} ({total} steps)")
        return lambda: None

    def message(self, text: str) -> None:
        """Say one line where more than the summary is wanted."""
        if self._verbose and not self._quiet:
            self._console.print(text, style="dim", markup=False)
