"""What a person sees in the terminal: a line per stage, a bar for the one that runs, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from tasks.caching import StageOutcome, Watcher
from vlmcore.evaluation.gates import GateResult

MoveBar = Callable[[float, float, str], None]

_STYLES = {"ran": "green", "cached": "dim", "failed": "bold red", "to run": "yellow"}


class TerminalWatcher(Watcher):
    """Draws on stderr, so that stdout stays free for `--json`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(*_columns(), console=console, transient=True)
        self._task = self._bar.add_task("", total=None, text="", visible=False)

    def __enter__(self) -> TerminalWatcher:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def started(self, stage: str) -> None:
        """Shows the stage with a spinner."""
        self._bar.reset(self._task, total=None, description=stage, text="", visible=True)
        if not self._console.is_terminal:
            self._console.print(f"{stage} …", style="dim")

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        """Moves the bar; without a terminal, prints a line."""
        label = f"{done:.0f}/{total:.0f}  {text}"
        self._bar.update(self._task, completed=done, total=total, text=label)
        if not self._console.is_terminal:
            self._console.print(f"  {label}", style="dim", soft_wrap=True)

    def note(self, stage: str, text: str) -> None:
        """Prints a line above the bar."""
        line = f"  {stage}: {text}"
        self._console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def finished(self, outcome: StageOutcome) -> None:
        """Prints the stage's line."""
        self._bar.update(self._task, visible=False)
        why = f"  [dim]({_short(outcome.reasons[0])})[/]" if outcome.reasons else ""
        self._console.print(
            f"[{_STYLES[outcome.state]}]{outcome.state:>7}[/]  {outcome.name:<28}"
            f"{outcome.seconds:>7.1f} s  [dim]{outcome.digest[:12]}[/]{why}",
            highlight=False,
            soft_wrap=True,
        )


@contextmanager
def progress_bar(console: Console, description: str) -> Iterator[MoveBar]:
    """A bar for one piece of work; gives what moves it: so much, of so much, of what."""
    with Progress(
        *_columns(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(description, total=None, text="")
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, text=f"{done:,.0f}/{total:,.0f}  {text}"
        )


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}", style="dim"),
        TimeElapsedColumn(),
    )


def _short(reason: str) -> str:
    """A reason on one line: a changed value may be a whole text."""
    return escape(shorten(reason, width=100, placeholder=" …"))


def print_summary(
    console: Console,
    outcomes: Sequence[StageOutcome],
    scores: Mapping[str, Mapping[str, float]],
    gates: Sequence[GateResult],
    *,
    wall_s: float,
    report: Path | None,
) -> None:
    """The table that ends a run: scores, gates, how long, where the report is."""
    if scores:
        metrics = sorted({metric for values in scores.values() for metric in values})
        table = Table(title="Scores", title_justify="left")
        table.add_column("checkpoint")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for checkpoint, values in scores.items():
            cells = [f"{values[m]:.4f}" if m in values else "" for m in metrics]
            table.add_row(checkpoint, *cells)
        console.print(table)
    for gate in gates:
        verdict = "[green]passed[/]" if gate.passed else "[bold red]missed[/]"
        console.print(f"gate {gate.gate}: {gate.value:.4f} {verdict}", highlight=False)
    count = {state: sum(o.state == state for o in outcomes) for state in ("ran", "cached")}
    console.print(
        f"{count['ran']} stages ran, {count['cached']} cached, {wall_s:.1f} s", highlight=False
    )
    if report is not None:
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def plan_table(outcomes: Sequence[StageOutcome]) -> Table:
    """What is cached, what will run, and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "state", "why"):
        table.add_column(column)
    for outcome in outcomes:
        style = _STYLES[outcome.state]
        table.add_row(
            outcome.name, f"[{style}]{outcome.state}[/]", "; ".join(map(_short, outcome.reasons))
        )
    return table
