"""What people see of a run: a progress bar, metrics.csv and curves.png."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint import write_atomically


@dataclass
class Done:
    """Everything about a run that is not a tensor."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # steps of the present epoch that are done
    total_steps: int = 0
    best: float | None = None  # the lowest validation log loss
    stale: int = 0  # epochs since
    history: list[dict[str, float]] = field(default_factory=list)


def write_history(history: list[dict[str, float]], out: Path) -> None:
    """metrics.csv and curves.png: loss, accuracy and AUC of training and validation by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(out / "metrics.csv", text.getvalue().encode())
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    curves = (
        ("log loss", "log_loss", "val_log_loss"),
        ("accuracy", "accuracy", "val_accuracy"),
        ("AUC", "auc", "val_auc"),
    )
    for axes, (title, ours, theirs) in zip(figure.subplots(1, 3), curves, strict=True):
        axes.plot(epochs, [row[ours] for row in history], marker=".", label="training, by face or clip")
        axes.plot(epochs, [row[theirs] for row in history], marker=".", label="validation, by video")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    write_atomically(out / "curves.png", image.getvalue())


class Bar:
    """The progress of a run for people: loss, log loss, AUC and images a second. Silent in all processes but one."""

    def __init__(self, name: str, epochs: int, steps: int, *, silent: bool) -> None:
        text = TextColumn("{task.fields[text]}")
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), text,
            disable=silent,
        )  # fmt: skip
        self._name, self._epochs = name, epochs
        self._loss, self._rate, self._then = float("nan"), float("nan"), time.perf_counter()
        self._task = self._progress.add_task(name, total=steps, text="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, done: Done, loss: float, images: int) -> None:
        now = time.perf_counter()
        rate, self._then = images / (now - self._then), now
        first = not np.isfinite(self._loss)
        self._loss = loss if first else 0.9 * self._loss + 0.1 * loss  # over some ten steps, as people read it
        self._rate = rate if first else 0.9 * self._rate + 0.1 * rate
        last = done.history[-1] if done.history else {"val_log_loss": float("nan"), "val_auc": float("nan")}
        self._progress.update(
            self._task,
            completed=done.step,
            description=f"{self._name} {done.epoch + 1}/{self._epochs}",
            text=f"loss {self._loss:.4f}  log loss {last['val_log_loss']:.4f}  AUC {last['val_auc']:.4f}  "
            f"{self._rate:.1f} images/s",
        )

    def end_epoch(self, done: Done) -> None:
        row = done.history[-1]
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch")
        if not self._progress.disable:
            self._progress.console.print(f"{self._name}: epoch {row['epoch']}  {numbers}", highlight=False)
        self._then = time.perf_counter()
