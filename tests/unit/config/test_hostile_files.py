"""Files of strangers: escape codes in them do not reach the terminal, bad YAML is named, a key file is read right."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import threading
from pathlib import Path

import pytest
from rich.console import Console

import tc_ray
from tc_ray.cli.command import quiet_logging, run_command
from tc_ray.cli.main import app
from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import ConfigError
from tc_ray.inspection.source import find_log
from tc_ray.serving.deploy.settings import KEY_VARIABLE, configured_digests, digest
from tc_ray.serving.errors import ServingError
from tc_ray.tracking.statusfile import ProgressView, read_status
from tc_ray.tracking.tracker import Tracker
from tests.support.inspection_samples import make_examples, make_log

PACKAGE = Path(tc_ray.__file__).parent
EVIL = "\x1b[2J\x1b]0;owned\x07[red]\x9b31m\u202e\r\b"
EVIL_NAME = "a\x1b[2J\x9b31m.parquet"
CONTROL = {"\x1b", "\x07", "\x9b", "\u202e", "\r", "\b"}


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Both outputs of a command, whether it fails or not."""
    with contextlib.suppress(SystemExit):
        run_command(lambda: app([str(argument) for argument in arguments], standalone_mode=False))
    out = capfd.readouterr()
    return out.out + out.err


@pytest.fixture
def evil_run(tmp_path: Path) -> Path:
    """A run whose status holds escape codes wherever there is text."""
    config = RunConfig.model_validate({"run": {"name": "trial", "folder": tmp_path}, "tracking": {"enabled": False}})
    tracker = Tracker(config, tmp_path)
    tracker.event("restart", f"worker {EVIL} died")
    tracker.event(EVIL, "other")
    tracker.pilot(1, {"loss": 1.0})
    tracker.finish("done")
    path = tmp_path / "status.json"
    document = json.loads(path.read_text()) | {"run": EVIL, "phase": EVIL, "state": EVIL, "mlflow": {"command": EVIL}}
    path.write_text(json.dumps(document))
    return tmp_path


@pytest.mark.parametrize("options", [(), ("--json",), ("--follow",)])
def test_a_status_cannot_steer_the_terminal(
    evil_run: Path, capfd: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """Fault 15: escape sequences in status.json reached the terminal raw."""
    shown = run(capfd, "status", evil_run, *options)
    assert not CONTROL & set(shown), repr(shown)
    assert "[red]" in shown, "shown as it is written, not as markup"


def test_a_live_line_cannot_steer_the_terminal(evil_run: Path) -> None:
    out = io.StringIO()
    view = ProgressView(Console(file=out, force_terminal=True, width=200, color_system=None))
    stop = threading.Event()
    stop.set()
    view.follow(lambda: read_status(evil_run), stop)
    shown = out.getvalue()
    assert "[red]" in shown and "\\x1b[2J" in shown
    assert "\x1b[2J" not in shown and not {"\x07", "\x9b", "\u202e", "\b"} & set(shown)


@pytest.mark.parametrize("command", ["verify", "stats", "show", "vacuum"])
def test_names_in_a_log_cannot_steer_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    """Fault 15: so did the names of a foreign log's files."""
    log = tmp_path / "log"
    make_log(log, make_examples(4))
    for commit in (log / "_delta_log").glob("*.json"):
        lines = [json.loads(line) for line in commit.read_text().splitlines()]
        for line in lines:
            if "add" in line:
                line["add"]["path"] = EVIL_NAME
        commit.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (log / EVIL_NAME).write_bytes(b"no Parquet")
    shown = run(capfd, "log", command, log, *(["--worst", 1] if command == "show" else []))
    assert not CONTROL & set(shown), repr(shown)
    assert "\\x1b[2J" in shown or command not in ("verify", "stats"), shown


def test_warnings_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    quiet_logging()
    assert logging.lastResort is not None
    logging.lastResort.handle(logging.makeLogRecord({"msg": "%s: passed over", "args": (EVIL_NAME,)}))
    shown = capsys.readouterr().err
    assert shown == "a\\x1b[2J\\x9b31m.parquet: passed over\n"


def test_errors_cannot_steer_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil = tmp_path / "a\x1b[2Jb"
    for arguments in (("status", evil), ("log", "stats", evil), ("eval", evil), ("train", evil), ("serve", evil)):
        shown = run(capfd, *arguments)
        assert "\\x1b[2Jb" in shown and not CONTROL & set(shown), repr(shown)


def test_what_is_printed_is_made_visible() -> None:
    """Every print of the package goes through `visible` (commands: through `say`), or holds nothing from outside."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("print", "typer.echo", "click.echo"):
                continue
            text = ast.unparse(node.args[0]) if node.args else ""
            if not (text.startswith("visible(") or isinstance(node.args[0], ast.Constant)):
                wrong.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)


BAD_YAML = {
    "long number": ("log: {top_k: " + "9" * 5000 + "}\n", "holds an impossible value"),
    "no date": ("log: {path: 2024-99-99}\n", "holds an impossible value"),
    "list as key": ("? [a, b]\n: 1\n", "config.yaml"),
    "no text": ("\0", "config.yaml"),
    "tag": ("log: !!python/object/apply:os.system [true]\n", "not YAML"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml_is_refused_by_name(tmp_path: Path, name: str) -> None:
    text, words = BAD_YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for read in (lambda: load_config(path), lambda: find_log(str(tmp_path))):
        with pytest.raises(ConfigError, match=r"config\.yaml") as refused:
            read()
        assert words in str(refused.value)


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbfpilot: {learning_rate: 1e-4}\n")
    config = load_config(path)
    assert config.pilot.learning_rate == 1e-4


GOOD_KEYS = {
    "byte-order mark": "\ufeff# of the team\nfirst\n".encode(),
    "mark before a key": "\ufefffirst\n".encode(),
    "Windows": b"# team\r\n\r\n  first \r\n",
    "old Mac": b"# team\rfirst\r",
    "blank comment": "\u00a0# team\nfirst".encode(),
}
BAD_KEYS = {
    "UTF-16": "# of the team\nfirst\n".encode("utf-16"),
    "UTF-16 without mark": "# of the team\nfirst\n".encode("utf-16-le"),
    "Latin-1": "# für alle\nfirst\n".encode("latin-1"),
    "NUL": b"first\0\n",
    "zeros": b"\0" * 40,
    "comment behind": b"first # of the team\n",
    "mark in the middle": "# one\n\ufeff# of the team\nfirst\n".encode(),
    "no-width space": "\u200bfirst\n".encode(),
    "next line": "first\x85second\n".encode(),
    "only comments": b"# nobody\n \n",
    "empty": b"",
}


@pytest.mark.parametrize("name", GOOD_KEYS)
def test_a_key_file_is_read_right(tmp_path: Path, name: str) -> None:
    """Fault 15: a byte-order mark turned the first comment line into a valid key."""
    (tmp_path / "keys").write_bytes(GOOD_KEYS[name])
    assert configured_digests(tmp_path / "keys") == (digest("first"),)


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_file_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "keys").write_bytes(BAD_KEYS[name])
    with pytest.raises(ServingError, match=r"API key file.*keys") as refused:
        configured_digests(tmp_path / "keys")
    assert "first" not in str(refused.value), "the message shows the key"


@pytest.mark.parametrize("value", ["\ufefffirst", "fir st", "first\x7f"])
def test_a_key_in_the_environment_is_checked_too(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, value)
    with pytest.raises(ServingError, match=KEY_VARIABLE):
        configured_digests()
