"""The ``dfengine`` command: parses, calls, prints. No logic of its own.

Results go to stdout, everything else to stderr. On a terminal the result is a table, at the end; in a pipe it is
tab-separated text, with --json one object a line, each as soon as it is known.
"""

from __future__ import annotations

import datetime
import io
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dfengine import __version__
from dfengine.bundle import Bundle
from dfengine.errors import DfengineError, OutputError, display_path
from dfengine.gpu.backends import compile_bundle
from dfengine.info import build_info, devices, packaged_bundles
from dfengine.jobs.deadline import parse_duration
from dfengine.jobs.inputs import expand_inputs
from dfengine.jobs.output import Output
from dfengine.jobs.run import Batch
from dfengine.jobs.summary import Summary
from dfengine.jobs.tables import COLUMNS, to_json, to_row
from dfengine.types import VideoScore

OK, SOME_FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# One video shows a progress bar only if it takes longer than this.
PATIENCE_SECONDS = 2.0

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Scores videos for face manipulation: the probability that a face was manipulated, with the evidence.",
)


def main() -> None:
    """Entry point of the command; turns dfengine's errors into one line and exit code 2."""
    if sys.stdout is None:  # closed by the caller (>&-): files may be asked for all the same
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not end a run
    try:
        app()
    except DfengineError as error:
        print(f"dfengine: error: {error}", file=sys.stderr)
        sys.exit(USAGE)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dfengine {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def score(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Videos, folders, glob patterns; - reads names from stdin."),
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a video.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write to FILE.jsonl, .csv or .parquet; replaces it.")] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write a CSV of filename,label, complete at all times.")
    ] = None,
    missing_label: Annotated[float, typer.Option(help="The label of files without a score, in --submission.")] = 0.5,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what is answered already, redo what failed.")] = False,
    bundle: Annotated[str, typer.Option(help="A packaged bundle by name, or a folder.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    frames: Annotated[
        str | None,
        typer.Option(help="N, uniform:N, every:K or first:N; :MAX limits (every:10:17), @SECONDS too (every:6@10)."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Frames: exact, reference (faster) or keyframe (fastest).")] = None,
    workers: Annotated[int | None, typer.Option(help="Videos at a time; default: one a core, 16 on a GPU.")] = None,
    timeout: Annotated[str | None, typer.Option(help="For each video: 90s, 5m; default: by its size.")] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="For the whole run: 9h, 1h30m, 45s. Spends less on each video to keep it.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    """Score videos. Exit code 0: all answered; 1: some failed (as rows); 2: usage, output, a defect; 130: stopped."""
    _set_up_logging(verbose)
    batch = Batch(
        expand_inputs(_read_stdin(), patterns=False) if paths == ["-"] else expand_inputs(paths),
        bundle=bundle,
        device=device,
        frames=frames,
        mode=mode,
        workers=workers,
        timeout_seconds=parse_duration(timeout) if timeout else None,
        time_limit_seconds=parse_duration(time_limit) if time_limit else None,
    )
    inputs = {job.fingerprint: display_path(job.path) for job in batch.jobs}
    show = _JsonLines() if json else _Table() if sys.stdout.isatty() else _TabSeparated()
    summary = Summary()
    files = {"out": out, "submission": submission, "missing_label": missing_label, "resume": resume}
    with Output(inputs, **files) as output, batch.stopping_on_signals():  # type: ignore[arg-type]
        with _progress(batch, len(inputs) - len(output.done), shown=not quiet) as advance:
            for result in batch.run(output.done):
                output.write(result)
                summary.add(result)
                show.add(result)
                advance(result)
        output.finish(complete=not batch.interrupted)
    show.end()
    raise typer.Exit(_conclude(batch, summary, output, notes=not quiet and not json))


@app.command(name="compile")
def compile_(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="A packaged bundle by name, or a folder.")],
    backend: Annotated[str, typer.Option(help="tensorrt (for this machine's GPU) or tensorrt_rtx (needs no GPU).")],
    out: Annotated[
        Path | None, typer.Option(help="Where the engines go; to use them, set DFENGINE_CACHE to that folder.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    """Compile the networks of a bundle and of its detector for GPUs, ahead of time: a file a network."""
    _set_up_logging(verbose)
    for name, path in compile_bundle(Bundle.load(bundle), backend, folder=out).items():
        print(f"{name}  {path}  {path.stat().st_size / 1e6:.1f} MB")


@app.command()
def info(json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Tell what this installation is made of, what can be used on this machine, and why the rest cannot."""
    build, usable, bundles = build_info(), devices(), packaged_bundles()
    if json:
        import json as json_module

        print(json_module.dumps({"build": build, "devices": usable, "bundles": bundles}))
        return
    for title, rows in (("build", build), ("devices", usable), ("bundles", bundles)):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<19} {value}")


def _set_up_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def _read_stdin() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


@contextmanager
def _progress(batch: Batch, total: int, *, shown: bool) -> Iterator[Callable[[VideoScore], None]]:
    """A bar on stderr, if that is a terminal; for one video only after a while."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda result: None
        return
    columns = (
        TextColumn("{task.fields[state]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("eta"),
        TimeRemainingColumn(),
    )  # fmt: skip
    started = time.monotonic()
    failed = 0
    # Redirected, what is printed goes above the bar, on stderr: right only where both are the same terminal.
    with Progress(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        task = bar.add_task("scoring", total=total, visible=total > 1, state="starting")
        patience = threading.Timer(PATIENCE_SECONDS, lambda: bar.update(task, visible=True))
        patience.start()

        def advance(result: VideoScore) -> None:
            nonlocal failed
            failed += result.status == "error"
            rate = (bar.tasks[0].completed + 1) / (time.monotonic() - started)
            state = f"{failed} failed, {rate:.1f} videos/s"
            if batch.deadline is not None:
                state += f", limit in {datetime.timedelta(seconds=int(batch.deadline.left()))}"
            bar.update(task, advance=1, state=state)

        try:
            yield advance
        finally:
            patience.cancel()


class _JsonLines:
    """One object a line, each at once."""

    def add(self, score: VideoScore) -> None:
        _print_line(to_json(score))

    def end(self) -> None:
        pass


class _TabSeparated:
    """For pipes: a line of names, then a line a video, each at once."""

    def __init__(self) -> None:
        self._header = "\t".join(COLUMNS)

    def add(self, score: VideoScore) -> None:
        cells = to_row(score).values()
        line = "\t".join("" if c is None else str(c).replace("\t", " ").replace("\n", " ") for c in cells)
        self.end()
        _print_line(line)

    def end(self) -> None:
        if self._header:
            _print_line(self._header)
            self._header = ""


class _Table:
    """For people: everything at the end, in columns."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, ...]] = []

    def add(self, score: VideoScore) -> None:
        note = f"{score.error.type}: {score.error.message}" if score.error else "; ".join(score.warnings)
        p_fake = "" if score.p_fake is None else f"{score.p_fake:.3f}"
        seconds = f"{sum(score.timings.values()):.1f}"
        counts = str(len(score.tracks)), str(score.frames_scored)
        self._rows.append((score.path, p_fake, score.status, *counts, seconds, note))

    def end(self) -> None:
        if not self._rows:
            return
        folder = _common_folder([path for path, *_ in self._rows])
        if folder:
            print(folder)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, justify in (("video", "left"), ("p_fake", "right"), ("status", "left"), ("people", "right"),
                              ("frames", "right"), ("seconds", "right"), ("note", "left")):  # fmt: skip
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for path, *cells in self._rows:
            name = os.path.relpath(path, folder) if folder else path
            table.add_row(
                *(Text(cell) for cell in (name, *cells))
            )  # Text: names may contain what rich takes for markup
        Console().print(table)


def _print_line(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _close_stdout()
        raise OutputError(
            f"standard output cannot be written ({error.strerror}); use --out to be able to resume"
        ) from None


def _close_stdout() -> None:
    """What is still buffered for it is dropped, or Python would try, and complain, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _conclude(batch: Batch, summary: Summary, output: Output, *, notes: bool) -> int:
    """Says what there is to say at the end; the exit code."""
    defect = "" if output.done else summary.defect
    if notes and not defect:
        _print_notes(batch, summary, len(output.done))
    if batch.interrupted:
        _print_how_to_resume(output.path)
        return INTERRUPTED
    if defect:
        print(f"dfengine: error: {defect}", file=sys.stderr)
        return USAGE
    return SOME_FAILED if output.failed else OK


def _print_notes(batch: Batch, summary: Summary, skipped: int) -> None:
    """What a person wants to know besides the rows."""
    lines: list[tuple[str, str]] = []
    if len(batch.jobs) > 1:
        names = (("ok", "ok"), ("no_face", "no face"), ("error", "failed"))
        lines.append(("videos", ", ".join(f"{summary.statuses[status]} {name}" for status, name in names)))
        lines += [("failed", f"{count} {kind}") for kind, count in summary.errors.most_common()]
        lines += [("fallback", f"{count} {reason}") for reason, count in summary.fallbacks.most_common()]
        if batch.deadline is not None:
            lines += [("spent", f"{count} with {what}") for what, count in summary.spent.most_common()]
        lines += [("slowest", f"{seconds:.1f} s {path}") for seconds, path in summary.slowest() if seconds > 0]
    if skipped:
        lines.append(("resumed", f"{skipped} answered before, not shown again"))
    if batch.repeated:
        lines.append(("repeated", f"{batch.repeated} named again, scored once"))
    if batch.bundle.experimental:
        made = batch.bundle.folder / "bundle.json"
        lines.append(("note", f"the bundle is experimental; how it was made and measured: {made}"))
    shown = ""
    for title, text in lines:
        print(f"{title if title != shown else '':<9} {text}", file=sys.stderr)
        shown = title


def _print_how_to_resume(rows: Path | None) -> None:
    if rows is None:
        print("interrupted; with --out FILE a run can be resumed", file=sys.stderr)
        return
    command = shlex.join(_resume_command(sys.argv))
    print(f"interrupted; the rows so far are in {rows}; go on with:\n  {command}", file=sys.stderr)


def _resume_command(argv: list[str]) -> list[str]:
    """The same command with --resume, which stands in front: behind "--" it would be the name of a file."""
    program = [sys.executable, "-m", "dfengine"] if argv[0].endswith("__main__.py") else argv[:1]
    start = argv.index("score") + 1
    end = argv.index("--") if "--" in argv else len(argv)
    options = [word for word in argv[start:end] if word != "--resume"]
    return [*program, *argv[1:start], "--resume", *options, *argv[end:]]


def _common_folder(paths: list[str]) -> str:
    """The folder that several files share, so that the table can name them shortly; "" if there is none."""
    absolute = {os.path.isabs(p) for p in paths}
    if len(paths) < 2 or len(absolute) > 1:
        return ""
    return os.path.commonpath([os.path.dirname(p) for p in paths])
