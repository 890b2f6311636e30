"""Live progress bars of runs, evaluations and builds, with rich; lines in a log where no bar can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowbench.cli.display.console import console
from flowbench.config import RunConfig
from flowbench.escape import plain
from flowbench.escape import terminal as escape

if TYPE_CHECKING:
    from flowbench.experiments.run import Listener
    from flowbench.training.trainer import IterationLog


def _progress(out: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=out,
    )


class LiveProgress:
    """A progress display that lives as long as its context, from the first that there is to show: an error before it
    stands alone."""

    def __init__(self, out: Console = console) -> None:
        self.progress = _progress(out)
        self.tasks: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}
        self.live = False  # within its context

    def __enter__(self) -> Any:
        self.live = True
        return self

    def __exit__(self, *_: object) -> None:
        if self.tasks:
            self.progress.stop()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Set a named bar; name and note are shown as text."""
        note = plain(note)
        if name not in self.tasks:
            if self.live:
                self.progress.start()
            self.tasks[name] = self.progress.add_task(plain(name), total=total, note=note)
        self.progress.update(self.tasks[name], completed=done, total=total, note=note)
        if not self.progress.console.is_terminal:
            self._log(name, done, total, note)

    def _log(self, name: str, done: int, total: int, note: str) -> None:
        """A line at every tenth, where no bar can be drawn: in a job's log."""
        tenth = 10 * done // max(total, 1)
        if tenth > self.tenths.get(name, 0):
            self.tenths[name] = tenth
            self.progress.console.print(f"{plain(name)} {done}/{total} {note}".rstrip(), highlight=False, markup=False)


class RunProgress(LiveProgress):
    """Iteration, reward, images per second and the time left of a run; then its evaluation."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config, self.iterations = config, 0

    def listener(self) -> Listener:
        """The callbacks for `run.execute`."""
        from flowbench.experiments.run import Listener

        return Listener(self._start, self._iteration, lambda done, total: self.show("evaluating", done, total))

    def _start(self, iteration: int, iterations: int) -> None:
        self.iterations = iterations
        c = self.config
        line = f"{c.algorithm} on {c.reward}, {c.model}, seed {c.seed}: {iterations} iterations"
        self.progress.console.print(escape(line))
        self.show("training", iteration, iterations)

    def _iteration(self, log: IterationLog) -> None:
        each = self.config.training.prompts_per_iteration * self.config.training.images_per_prompt
        note = f"reward {log.reward:.4f}  {each / log.seconds:.0f} images/s"
        self.show("training", log.iteration, self.iterations, note)


class EvaluationProgress(LiveProgress):
    """A bar for `evaluate`."""

    def __call__(self, done: int, total: int) -> None:
        """Images done, of all images."""
        self.show("evaluating", done, total)


class BuildProgress(LiveProgress):
    """A bar for each stage of `testbed build`."""

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        """Steps done of a stage, and its loss."""
        self.show(stage, done, total, f"loss {loss:.4f}" if loss else "")
