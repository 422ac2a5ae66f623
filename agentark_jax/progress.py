"""Progress bars with rate and remaining time, and one line per finished stage."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    """Tokens per second since the bar began, or what it counts where that takes none."""

    def render(self, task: Task) -> Text:
        tokens = task.fields.get("tokens", 0)
        if not task.elapsed or not (tokens or task.completed):
            return Text("", style="progress.data.speed")
        rate = f"{tokens / task.elapsed:,.0f} tokens/s" if tokens else f"{task.completed / task.elapsed:,.1f}/s"
        return Text(rate, style="progress.data.speed")


class Bar:
    """One bar; `advance` with what is done, or `set` to a position.

    `total` may grow as work is discovered; None where it is unknown.
    """

    def __init__(self, progress: Progress, description: str, total: int | None):
        self._progress = progress
        self._task = progress.add_task(description, total=total, tokens=0)
        self._tokens = 0

    def advance(self, tokens: int = 0) -> None:
        self._tokens += tokens
        self._progress.update(self._task, advance=1, tokens=self._tokens)

    def more(self, done: int) -> None:
        self._progress.update(self._task, advance=done)

    def set(self, done: int, total: int | None, tokens: int) -> None:
        self._progress.update(self._task, completed=done, total=total, tokens=tokens)


class _Once(logging.Filter):
    """Lets a message through when it comes for the first time: stages have much in common."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in self._seen
        self._seen.add(text)
        return new


class Display:
    """What a run shows on the terminal."""

    def __init__(self, console: Console):
        self.console = console
        logger = logging.getLogger(__package__)
        logger.setLevel(logging.INFO)
        handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
        handler.addFilter(_Once())
        logger.handlers, logger.propagate = [handler], False

    @contextmanager
    def bar(self, description: str, total: int | None) -> Iterator[Bar]:
        """A bar for the time of the `with` block."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as progress:
            yield Bar(progress, description, total)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)
