"""Tables and numbers of the docs that a user goes by, against the code that they are about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from fastapi.testclient import TestClient
from ray.util.metrics import Counter

from tc_ray.config.schema import RunConfig
from tc_ray.copilot import training
from tc_ray.mistakelog.read import reader_lease
from tc_ray.mistakelog.rows.schema import PREFIX, ROW_SCHEMA, SCHEMA_VERSION, LogMetadata
from tc_ray.mistakelog.table import lease
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.models.families import FAMILIES
from tc_ray.serving import wire
from tc_ray.serving.engine import engine, prefixes
from tc_ray.serving.failover import proxy
from tc_ray.serving.http import requests
from tc_ray.serving.http.metrics import Metrics
from tests.support import other_clients
from tests.support.mistakelog_samples import metadata
from tests.support.serving_client import client_of, settings_of
from tests.support.serving_samples import make_export

ROOT = Path(__file__).resolve().parents[2]


def text_of(name: str) -> str:
    """A page, its line breaks as blanks."""
    return re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8"))


def rows_of(name: str, head: str) -> list[list[str]]:
    """Cells of the table whose first row begins with `head`."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith(head)]
    found = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


# -- the log ------------------------------------------------------------------------------------------------------

TYPES = {
    "string": pa.string(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "binary": pa.binary(),
    "binary or null": pa.binary(),
    "list of int32": pa.list_(pa.int32()),
    "list of float32": pa.list_(pa.float32()),
    "list of bool": pa.list_(pa.bool_()),
}


def test_the_columns_of_the_log_are_those_of_its_page() -> None:
    told = [
        (cells[0].strip("`"), TYPES[cells[1].split(",")[0]]) for cells in rows_of("docs/mistake-log.md", "| column |")
    ]
    assert told == [(field.name, field.type) for field in ROW_SCHEMA]
    assert f"Schema version {SCHEMA_VERSION}. " in text_of("docs/mistake-log.md")


def test_what_holds_for_all_rows_is_in_the_table_under_the_names_of_the_page(tmp_path: Path) -> None:
    configuration = LogStore.create(tmp_path, metadata()).metadata.to_configuration()
    page = (ROOT / "docs/mistake-log.md").read_text(encoding="utf-8")
    paragraph = re.search(r"table's configuration under `tc_ray\.`:(.*?)\n\n", page, flags=re.DOTALL)
    assert paragraph is not None
    names = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", paragraph[1]))
    told = {PREFIX + name for name in names}
    assert told == configuration.keys() == {PREFIX + field.name for field in fields(LogMetadata)}
    assert configuration.items() <= DeltaTable(str(tmp_path)).metadata().configuration.items()


def test_commits_are_kept_for_good(tmp_path: Path) -> None:
    """Checksums and drop counts stand in them: Delta must never clean them up by age, as it does after 30 days by default."""
    LogStore.create(tmp_path, metadata())
    kept = DeltaTable(str(tmp_path)).metadata().configuration["delta.logRetentionDuration"]
    assert int(kept.split()[1]) >= 36500 and kept.endswith("days")


# -- times and bounds ---------------------------------------------------------------------------------------------

SERVING, LOG, ARCHITECTURE = "docs/serving.md", "docs/mistake-log.md", "docs/architecture.md"
defaults = RunConfig()

NUMBERS: list[tuple[str, str, float]] = [
    (LOG, r"after (\d+) s of silence", lease.STALE_SECONDS),
    (LOG, r"`log\.vacuum_grace_seconds` \((\d+) minutes\)", defaults.log.vacuum_grace_seconds / 60),
    (LOG, r"`log\.file_bytes` \((\d+) MB\)", defaults.log.file_bytes / 2**20),
    (LOG, r"`log\.top_k` \| how many \((\d+)", defaults.log.top_k),
    (ARCHITECTURE, r"lease \(touched every (\d+) s\)", lease._TOUCH_SECONDS),
    (ARCHITECTURE, r"leases \(renewed every (\d+) s\)", reader_lease._RENEW_SECONDS),
    (ARCHITECTURE, r"then sleep ([\d.]+) s at a time", training.IDLE_SECONDS),
    (ARCHITECTURE, r"buffer \(last (\d+) rounds\)", defaults.copilot.buffer_rounds),
    (SERVING, r"computed something in the last (\d+) s", engine.STALL_S),
    (SERVING, r"a body that takes more than (\d+) s", wire.BODY_TIMEOUT_S),
    (SERVING, r"bodies of more than (\d+) MiB in a proxy", proxy.MAX_HELD_BYTES / 2**20),
    (SERVING, r"begins with (\d+) or more of the same tokens", prefixes.MIN_TOKENS),
    (SERVING, r"`stop` (\d+) strings", requests.MAX_STOPS),
    (SERVING, r"strings of (\d+) characters", requests.MAX_STOP_CHARACTERS),
    (SERVING, r"`temperature` to 2 \(below ([\d.]+)", requests.MIN_TEMPERATURE),
    (SERVING, r"`top_logprobs` to (\d+)", requests.MAX_TOP_LOGPROBS),
    ("docs/status.md", r"waits up to (\d+) s for a free place", proxy.RESUME_WITHIN_S),
    ("docs/status.md", r"for a free place, (three) times at most", proxy.MAX_RESUMES),
]
WORDS = {"three": 3.0}


@pytest.mark.parametrize(("page", "words", "value"), NUMBERS, ids=[f"{page}: {words}" for page, words, _ in NUMBERS])
def test_numbers_are_those_of_the_code(page: str, words: str, value: float) -> None:
    (told,) = set(re.findall(words, text_of(page)))
    assert (WORDS[told] if told in WORDS else float(told)) == pytest.approx(value)


# -- serving ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client_of(settings_of(make_export(tmp_path_factory.mktemp("serving"), positions=128))) as client:
        yield client


def test_the_routes_are_those_of_the_page(client: TestClient) -> None:
    cells = [cells[0] for cells in rows_of(SERVING, "| route |")]
    told = set()
    for cell in cells:
        method = re.match(r"`(GET|POST)", cell)
        assert method, cell
        told |= {(method[1], path.replace("NAME", "{name}")) for path in re.findall(r"(/[\w/]*(?:/NAME)?)`", cell)}
    document = client.get("/openapi.json").json()["paths"]
    there = {(method.upper(), path) for path, item in document.items() for method in item}
    assert told == there | {("GET", "/")}


def test_the_metrics_are_those_of_the_page() -> None:
    exported = set()
    for value in vars(Metrics()).values():
        for metric in value.values() if isinstance(value, dict) else [value]:
            exported.add(f"ray_{metric.info['name']}" + "_total" * isinstance(metric, Counter))
    assert set(re.findall(r"`(ray_tc_ray_\w+[a-z])`", text_of(SERVING))) == exported


# -- models, packages ---------------------------------------------------------------------------------------------


def test_the_families_are_those_of_the_page() -> None:
    told = [cells[0].strip("`") for cells in rows_of("docs/families.md", "| `model_type` |")]
    assert sorted(told) == sorted(FAMILIES)


def test_every_dependency_is_accounted_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[\n(.*?)^\]", project, flags=re.DOTALL | re.MULTILINE)
    assert len(lists) == 2
    names = {re.split(r"[\[<>=,]", entry)[0] for entry in re.findall(r'"(.+?)",?\n', "".join(lists))}
    assert {"ray", "torch", "schemathesis"} <= names
    page = (ROOT / "docs/decisions.md").read_text(encoding="utf-8")
    assert [name for name in sorted(names) if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", page)] == []


def test_the_clients_are_those_that_the_tests_install() -> None:
    versions = {cells[0]: cells[1] for cells in rows_of("docs/serving.md", "| client | version |")}
    for name, version in other_clients.PYTHON.items():
        assert versions.pop(name) == version
    for name in ("openai", "ai"):
        [row] = [row for row in versions if row.startswith(f"{name} of npm")]
        assert versions.pop(row) == other_clients.NODE[name]
    assert versions.keys() == {"curl", "a browser"}
