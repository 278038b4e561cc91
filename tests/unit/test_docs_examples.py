"""What the pages show can be done: the Python of the docs runs, the commands exist with their options, the links lead somewhere.

The examples stand on `make demo`; here they run on a tiny export and a tiny log, in its place.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np
import pytest
import typer

from tc_ray.cli.main import app
from tc_ray.config.log import LogSection
from tc_ray.mistakelog.commit.ledger import Ledger
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.mistakelog.write.writer import RecordWriter
from tests.support.family_samples import folder_of, make_copilot, new_pilot, quiet
from tests.support.mistakelog_samples import metadata, random_records
from tests.support.serving_samples import make_export
from tests.support.tiny_families import DECODER_ONLY

matplotlib.use("Agg")
quiet()

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "cluster/README.md",
    ROOT / "jobs/lm_eval/README.md",
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def python_of(name: str) -> list[str]:
    """The page's blocks of Python, in order."""
    return re.findall(r"^ *```python\n(.*?)^ *```", text_of(name), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with outputs/demo/export and outputs/t5-lastfm/export in it, tiny."""
    made = make_export(tmp_path / "made")
    shutil.copytree(made, tmp_path / "outputs/demo/export")
    from tc_ray.models.fusion import FusedModel

    copilot, _ = make_copilot("t5")
    FusedModel.join(new_pilot("t5"), copilot, lam=0.5).save_pretrained(tmp_path / "outputs/t5-lastfm/export")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A current folder with a log of 20 rounds in outputs/demo/log; parameter: `log.states`."""
    folder, kind = tmp_path / "outputs/demo/log", getattr(request, "param", "bf16")
    LogStore.create(folder, metadata(rationale_dtype=kind))
    ledger = Ledger(folder, writers=1, run="test")
    options: dict[str, Any] = {"flush_rounds": 4, "file_bytes": 2**30, "queue_rounds": 8}
    writer = RecordWriter(
        folder, ledger.commit, LogSection(**options), run="test", rank=0, attempt=ledger.begin_attempt(0, 1)
    )
    for number in range(1, 21):
        records = random_records(6, round=number, first_sample=10 * number)
        writer.put(dataclasses.replace(records, rationale_dtype=kind), number)
        writer.end_round(number)
    writer.close()
    monkeypatch.chdir(tmp_path)
    return folder


def run(blocks: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """The blocks one after the other, as in one session; calls that need a Ray are left out."""
    for block in blocks:
        kept = "\n".join(line for line in block.splitlines() if ".dataset(" not in line)
        exec(compile(kept, "<docs>", "exec"), names)  # noqa: S102 - the docs of this repository
    return names


def test_the_examples_of_decoding_run(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beams, samples, lambdas, streams, stop strings, log-probabilities, explanations, the lens, an encoder-decoder."""
    blocks = python_of("docs/fused-decoding.md")
    assert len(blocks) >= 8
    found = run(blocks, {})
    assert (demo / "lens.png").read_bytes().startswith(b"\x89PNG")
    # scored alone they are what decoding told, as the page prints
    assert float((found["scores"].fused_logprobs - found["out"].fused_logprobs).abs().max()) < 1e-3
    assert "p~" in capsys.readouterr().out


def test_the_examples_of_the_readme_run(demo: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decoding, reading = python_of("README.md")
    run([decoding], {})
    assert capsys.readouterr().out.strip()
    run([reading], {})


@pytest.mark.parametrize("log", ["bf16", "int8"], indirect=True)
def test_the_examples_of_reading_a_log_run(log: Path) -> None:
    """With Polars, DuckDB, deltalake and NumPy, and with tc-ray's own readers."""
    blocks = python_of("docs/mistake-log.md")
    assert len(blocks) == 4
    found = run(blocks, {})
    row = found["row"]
    targets = len(row["input_ids"]) - row["target_start"]
    assert found["ids"].shape == found["errors"].shape == (targets, metadata().top_k + 1)
    records = MistakeLog(log).records()
    one = records.select(np.flatnonzero(records.sample_id == row["sample_id"]))
    bits = one.rationale.astype(np.uint32) << 16
    np.testing.assert_allclose(found["states"], bits.view(np.float32), rtol=2.0**-8)
    assert len(found["records"]) == 6 * 8 and len(found["update"].new) == 5


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_the_first_look_at_a_family_runs(family: str) -> None:
    """As docs/families.md shows it, on a tiny model in place of "path/of/a/model"."""
    (look,) = [block for block in python_of("docs/families.md") if "path/of/a/model" in block]
    found = run([textwrap.dedent(look).replace("path/of/a/model", str(folder_of(family)))], {})
    assert found["out"].logits.shape[:2] == (1, 12)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `tc-ray ...` that a page shows in code, without comments and continuation."""
    found = []
    for name in NAMES:
        code = re.findall(r"^(?: {4,}|\t)(.*)$|`([^`\n]+)`", text_of(name), flags=re.MULTILINE)
        fenced = re.findall(r"^```(?:yaml|bash|)\n(.*?)^```", text_of(name), flags=re.DOTALL | re.MULTILINE)
        lines = [indented or inline for indented, inline in code] + [
            line for block in fenced for line in block.splitlines()
        ]
        for line in lines:
            for part in re.split(r",\s+(?=tc-ray )", line.split("  #")[0].split("    ")[0]):
                if match := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*tc-ray (.*)", part.strip()):
                    found.append((name, match[1].split()))
    return found


def test_commands_that_are_shown_exist_with_their_options() -> None:
    shown = commands()
    assert {words[0] for _, words in shown} >= {"train", "train-copilot", "eval", "fuse", "serve", "status", "log"}
    wrong = []
    for name, words in shown:
        command: Any = typer.main.get_command(app)
        rest = list(words)
        while isinstance(command, click.Group) or hasattr(command, "commands"):
            known = [rest[0]] if rest and not re.search(r"[|.]", rest[0]) else rest[0].split("|") if rest else []
            missing = [one for one in known if one not in command.commands and one != "..."]
            if missing:
                wrong.append(f"{name}: tc-ray {' '.join(words)}: no command {missing}")
            if missing or not known or known == ["..."]:
                break
            command, rest = command.commands[known[0]], rest[1:]
        options = {option for parameter in getattr(command, "params", []) for option in parameter.opts}
        given = [re.match(r"--[a-z-]+", word.strip("[]")) for word in rest]
        unknown = [one[0] for one in given if one and one[0] not in options]
        if unknown:
            wrong.append(f"{name}: tc-ray {' '.join(words)}: no option {unknown}")
    assert not wrong, "\n".join(wrong)


def test_make_targets_that_are_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    shown = {
        target
        for name in NAMES
        for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", text_of(name), flags=re.MULTILINE)
    }
    assert {"demo", "test", "test-slow", "test-gpu"} <= shown <= targets


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    """Links to files of the repository, and paths of it in code."""
    linked = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name))]
    files = [(ROOT / name).parent / link for link in linked if link and "://" not in link]
    paths = re.findall(r"`((?:tc_ray|tests|jobs|cluster|docs|examples)/[\w./-]+\.\w+)`", text_of(name))
    files += [ROOT / path for path in paths]
    assert [file for file in files if not file.exists()] == []
