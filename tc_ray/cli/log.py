"""`tc-ray log`: inspect, export, check and clean up a Mistake Log. Needs no Ray; works while the run goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tc_ray.cli.command import say
from tc_ray.files import write_file
from tc_ray.text import byte_size

if TYPE_CHECKING:
    from tc_ray.inspection.source import LogPlace
    from tc_ray.inspection.tokens import TokenTexts
    from tc_ray.mistakelog.read.reader import MistakeLog
    from tc_ray.mistakelog.table.location import Location

EXIT_FINDINGS = 1

Log = Annotated[
    str, typer.Argument(metavar="LOG", help="Run folder, folder of a log, or its URI (s3://, gs://, az://).")
]
Storage = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="Option of the object store; may be given again. Those in a run folder's config are not used.",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder or hub id; default: the run's, else that of the Pilot in the log."),
]
Rounds = Annotated[
    str | None,
    typer.Option("--rounds", metavar="A:B", help="First and last round, both included; either may be left out."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

log = typer.Typer(no_args_is_help=True, help="Inspect a Mistake Log: stats, show, report, export, verify, vacuum.")


@log.command("stats")
def stats(
    source: Log,
    rounds: Rounds = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens and samples listed.")] = 10,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Mistakes by round and by epoch, calibration, tokens most often missed, hardest samples."""
    from tc_ray.inspection.stats import collect
    from tc_ray.inspection.terminal import print_view, stats_view

    with _opened(source, storage, tokenizer) as (opened, texts):
        found = collect(opened, parse_rounds(rounds))
        if as_json:
            say(json.dumps(found.to_dict(texts, top), indent=1))
        else:
            print_view(stats_view(found, texts, top))


@log.command("show")
def show(
    source: Log,
    sample: Annotated[int | None, typer.Argument(help="Sample id.")] = None,
    worst: Annotated[int | None, typer.Option("--worst", min=1, help="Show the N hardest samples instead.")] = None,
    round: Annotated[
        int | None, typer.Option("--round", help="Only this round; default: all in which it was trained on.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page instead of printing.")] = None,
    tokenizer: Tokenizer = None,
    storage: Storage = None,
) -> None:
    """A sample with every token coloured by its error, and what the Pilot predicted instead."""
    from tc_ray.inspection.samples import find_visits, visits_of
    from tc_ray.inspection.stats import collect
    from tc_ray.inspection.terminal import legend, print_view, sample_view

    if (sample is None) == (worst is None):
        raise ValueError("name a sample: its id, or --worst N")
    with _opened(source, storage, tokenizer) as (opened, texts):
        if sample is not None:
            samples = {sample: visits_of(opened, sample, round)}
        else:
            assert worst is not None
            span = None if round is None else (round, round)
            found = collect(opened, span)
            samples = find_visits(opened, found.hardest(worst).sample_id.tolist(), span)
            if not samples:
                raise ValueError(f"{source}: no row with target tokens" + (f" in round {round}" if round else ""))
        if html is not None:
            from tc_ray.inspection.report import sample_page

            write_file(html, sample_page(opened.metadata, samples, texts))
            say(f"{html}: {len(samples)} sample{'s' * (len(samples) != 1)}, {texts.note}")
            return
        print_view(legend())
        for visits in samples.values():
            say("")
            print_view(sample_view(visits, texts))
        if not texts.known:
            say(f"\n{texts.note}")


@log.command("report")
def report(
    source: Log,
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("report.html"),
    rounds: Rounds = None,
    tokenizer: Tokenizer = None,
    storage: Storage = None,
) -> None:
    """One self-contained HTML page: error heat map, loss and accuracy, confusions, calibration, samples."""
    from tc_ray.inspection.report import report_page

    with _opened(source, storage, tokenizer) as (opened, texts):
        write_file(out, report_page(opened, texts, parse_rounds(rounds)))
        say(f"{out}: {byte_size(out.stat().st_size)}, {texts.note}")


@log.command("export")
def export(
    source: Log,
    out: Annotated[Path, typer.Option("--out", help="New file of JSON lines.")],
    rounds: Rounds = None,
    tokenizer: Tokenizer = None,
    storage: Storage = None,
) -> None:
    """Copy rows out of the log as JSON lines, with texts. (Other programs read the log itself: it is a Delta table.)"""
    from tc_ray.inspection.samples import ExportError, export_jsonl

    if out.suffix != ".jsonl":
        raise ExportError(f"--out {out}: the name must end in .jsonl, as JSON lines are written")
    with _opened(source, storage, tokenizer) as (opened, texts):
        rows = export_jsonl(opened, out, texts, parse_rounds(rounds))
        if not texts.known:
            say(texts.note, error=True)
        say(f"{out}: {rows:,} rows, {byte_size(out.stat().st_size)}")


@log.command("verify")
def verify(
    source: Log,
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Remove bad files from the table and keep them in a folder of their own."),
    ] = False,
    storage: Storage = None,
) -> None:
    """Check every file of the log against its commit: size, rows, CRC-32, schema. Exit code 1: something is wrong."""
    from tc_ray.mistakelog.maintain.verify import verify_log

    result = verify_log(_location(source, storage), quarantine=quarantine)
    say("\n".join(result.lines()))
    if not result.good:
        raise typer.Exit(EXIT_FINDINGS)


@log.command("vacuum")
def vacuum(
    source: Log,
    grace_seconds: Annotated[
        float, typer.Option("--grace-seconds", min=0, help="Files that left the log less than this long ago stay.")
    ] = 600.0,
    orphan_seconds: Annotated[
        float, typer.Option("--orphan-seconds", min=0, help="Files never committed and younger than this stay.")
    ] = 3600.0,
    storage: Storage = None,
) -> None:
    """Delete files that no version in use needs."""
    from tc_ray.mistakelog.maintain.vacuum import vacuum_log

    location = _location(source, storage)
    say("\n".join(vacuum_log(location, orphan_seconds=orphan_seconds, grace_seconds=grace_seconds).lines()))


def parse_rounds(text: str | None) -> tuple[int, int] | None:
    """First and last round of A:B, A:, :B or A. Raises ValueError: it is none of these, or the first is after the last."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)?(:)?(\d+)?", text)
    first, colon, last = found.groups() if found else (None, None, None)
    low, high = int(first or 0), int(last or (2**62 if colon else first or 0))
    if (first is None and last is None) or low > high or (last and not colon):
        raise ValueError(f"--rounds {text!r}: expected A:B with A at most B, for instance 10:20, 10: or :20")
    return low, high


def _place(source: str, storage: list[str] | None) -> LogPlace:
    from tc_ray.inspection.source import find_log

    place = find_log(source, storage or [])
    if place.note:
        say(place.note, error=True)
    return place


def _location(source: str, storage: list[str] | None) -> Location:
    from tc_ray.mistakelog.table.location import Location

    place = _place(source, storage)
    return Location(place.uri, place.options or None)


@contextmanager
def _opened(source: str, storage: list[str] | None, tokenizer: str | None) -> Iterator[tuple[MistakeLog, TokenTexts]]:
    """The log and the texts of its tokens. If rows are missing from what was shown, say so, and exit with an error code."""
    from tc_ray.inspection.tokens import find_tokenizer

    place = _place(source, storage)
    opened = place.open()
    yield opened, find_tokenizer(opened.metadata, place.run_folder, tokenizer)
    left_out = sum(opened.not_finite.values())
    if left_out:
        say(f"{left_out:,} rows hold numbers that are not finite and are left out above", error=True)
    if opened.bad_files:
        say(
            f"{len(opened.bad_files)} damaged files were skipped, their rows are missing above: "
            "`tc-ray log verify` says what is wrong with them",
            error=True,
        )
        raise typer.Exit(EXIT_FINDINGS)
