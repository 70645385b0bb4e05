"""The ``dfengine`` command: parses, calls, prints. No logic of its own.

Results go to stdout, everything else to stderr. On a terminal the result is a table; in a pipe it is tab-separated
text; with --json it is one object a line, each as soon as it is known.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

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

from dfengine import __version__, results
from dfengine.batch import expand_inputs
from dfengine.engine import Engine
from dfengine.errors import DfengineError
from dfengine.info import build_info, devices, packaged_bundles
from dfengine.types import VideoScore

OK, SOME_FAILED, USAGE = 0, 1, 2

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
    try:
        app()
    except DfengineError as error:
        print(f"dfengine: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except BrokenPipeError:  # the reader went away (| head): there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(SOME_FAILED)


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
    out: Annotated[Path | None, typer.Option(help="Also write to FILE.jsonl, .csv or .parquet.")] = None,
    bundle: Annotated[str, typer.Option(help="A packaged bundle by name, or a folder.")] = "default",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    frames: Annotated[
        str | None, typer.Option(help="N, uniform:N, every:K or first:N; :MAX limits (every:10:17).")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Frames: exact, reference (faster) or keyframe (fastest).")] = None,
    workers: Annotated[int | None, typer.Option(help="Videos scored at a time; default: one a core.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no summary.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, to stderr.")] = False,
) -> None:
    """Score videos. Exit code 0: all answered; 1: some failed (each is a row); 2: usage."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    files = expand_inputs(_read_stdin() if paths == ["-"] else paths)
    failed = 0
    done: list[VideoScore] = []
    with ExitStack() as stack:
        writer = stack.enter_context(results.open_writer(out)) if out else None
        engine = stack.enter_context(Engine(bundle, device=device, frames=frames, mode=mode, workers=workers))
        advance = stack.enter_context(_progress(len(files), shown=not quiet))
        scores = map(engine.score, files) if len(files) == 1 else engine.stream(files)
        for result in scores:
            failed += result.status == "error"
            if writer:
                writer.write(result)
            if json:
                print(results.to_json(result), flush=True)
            else:
                done.append(result)
            advance(result)
    if not json:
        _print_scores(done, quiet=quiet)
        if not quiet and engine.bundle.experimental:
            made = engine.bundle.folder / "bundle.json"
            print(f"note: the bundle is experimental; how it was made and measured: {made}", file=sys.stderr)
    raise typer.Exit(SOME_FAILED if failed else OK)


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
            print(f"  {name:<18} {value}")


def _read_stdin() -> list[str]:
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal; for one video only after a while."""
    console = Console(stderr=True)
    if not shown or not console.is_terminal:
        yield lambda result: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("scoring", total=total, visible=total > 1)
        patience = threading.Timer(PATIENCE_SECONDS, lambda: bar.update(task, visible=True))
        patience.start()
        try:
            yield lambda result: bar.update(task, advance=1, description=Path(result.path).name[:32])
        finally:
            patience.cancel()


def _print_scores(scores: list[VideoScore], *, quiet: bool) -> None:
    """A table for a terminal, tab-separated text for a pipe."""
    console = Console()
    if not console.is_terminal:
        print(*results.COLUMNS, sep="\t")
        for score in scores:
            cells = results.to_row(score).values()
            print(*("" if c is None else str(c).replace("\t", " ").replace("\n", " ") for c in cells), sep="\t")
        return
    folder = _common_folder([s.path for s in scores])
    if folder:
        print(folder)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("video", "left"), ("p_fake", "right"), ("status", "left"), ("people", "right"),
                          ("frames", "right"), ("seconds", "right"), ("note", "left")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for score in scores:
        note = f"{score.error.type}: {score.error.message}" if score.error else "; ".join(score.warnings)
        p_fake = "" if score.p_fake is None else f"{score.p_fake:.3f}"
        seconds = f"{sum(score.timings.values()):.1f}"
        name = os.path.relpath(score.path, folder) if folder else score.path
        row = (name, p_fake, str(score.status), str(len(score.tracks)), str(score.frames_scored), seconds, note)
        table.add_row(*(Text(cell) for cell in row))  # Text: names may contain what rich takes for markup
    console.print(table)
    if not quiet and len(scores) > 1:
        counts = {s: sum(r.status == s for r in scores) for s in ("ok", "no_face", "error")}
        print(", ".join(f"{n} {s}" for s, n in counts.items()), file=sys.stderr)


def _common_folder(paths: list[str]) -> str:
    """The folder that several files share, so that the table can name them shortly; "" if there is none."""
    absolute = {os.path.isabs(p) for p in paths}
    if len(paths) < 2 or len(absolute) > 1:
        return ""
    return os.path.commonpath([os.path.dirname(p) for p in paths])
