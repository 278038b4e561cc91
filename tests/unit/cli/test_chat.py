"""`tc-ray chat`: lines in, both answers out; in a terminal beside each other, and with Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tc_ray.models.fusion import FusedModel
from tc_ray.serving.chat.conversation import FUSED, PILOT, Conversation, open_conversation
from tc_ray.serving.chat.terminal import run_chat
from tc_ray.serving.errors import RequestError
from tests.support.command_line import ROOT, tc_ray
from tests.support.serving_samples import CHAT_TEMPLATE, make_export, make_tokenizer, offline

TOKENS = 12


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("run"), positions=256)


@pytest.fixture
def talk(export: Path) -> Iterator[Conversation]:
    with open_conversation(export, TOKENS) as conversation:
        yield conversation


def said(conversation: Conversation, message: str) -> dict[str, str]:
    answers: dict[str, str] = {}
    for side, text in conversation.ask(message):
        answers[side] = answers.get(side, "") + text
    return answers


def alone(export: Path, turns: list[tuple[str, str]], lam: float) -> str:
    """What `generate` says to a conversation, without an engine."""
    tokenizer, model = make_tokenizer(), FusedModel.from_pretrained(export)
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, tokenize=True
    )
    ids = tuple(ids["input_ids"]) if not isinstance(ids, list) else tuple(ids)
    options = {"max_new_tokens": TOKENS, "lam": lam, "do_sample": False}
    return str(tokenizer.decode(offline(model, ids, **options), skip_special_tokens=True))


def test_each_side_goes_on_from_its_own_answers(talk: Conversation, export: Path) -> None:
    """As `generate` alone would, with lambda 0 and with lambda."""
    talk.set_lam("0.7")
    first = said(talk, "an apple")
    assert first == {side: alone(export, [("user", "an apple")], lam) for side, lam in ((PILOT, 0.0), (FUSED, 0.7))}
    assert first[PILOT] != first[FUSED], "the test would not see a mixture of both"
    assert talk.cut == {PILOT, FUSED}
    second = said(talk, "the 3")
    for side, lam in ((PILOT, 0.0), (FUSED, 0.7)):
        turns = [("user", "an apple"), ("assistant", first[side]), ("user", "the 3")]
        assert second[side] == alone(export, turns, lam)
    talk.clear()
    assert said(talk, "an apple") == first


def test_lambda_zero_is_the_pilot_for_both(talk: Conversation, export: Path) -> None:
    talk.set_lam("0")
    first = said(talk, "an apple")
    assert list(first) == [PILOT]
    talk.set_lam("0.7")
    turns = [("user", "an apple"), ("assistant", first[PILOT]), ("user", "the 3")]
    assert said(talk, "the 3")[FUSED] == alone(export, turns, 0.7)


def test_what_is_stopped_or_refused_is_forgotten(talk: Conversation) -> None:
    first = said(talk, "an apple")
    talk.clear()
    pieces = talk.ask("the 3")
    next(pieces)
    pieces.close()
    with pytest.raises(RequestError, match="maximum context length is 256"):
        said(talk, "w" * 300)
    assert said(talk, "an apple") == first


def feed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_lines_without_a_terminal(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "an apple", "", "/lam 0", "the 3", "/lam", "/lam 11", "/lam x", "/lam nan", "/wrong", "/help")
    done = tc_ray("chat", export, "--max-tokens", TOKENS)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(r"\S+: Pilot, and fused with lambda 0\.5; /help shows the commands", lines[0])
    assert lines[1] == "you> an apple" and "\nPilot> " in done.stdout and "\nfused (lambda 0.5)> " in done.stdout
    after = done.stdout.partition("you> the 3")[2]
    assert "Pilot> " in after and "fused (" not in after
    assert after.count("lambda 0, the Pilot alone") == 1
    for wrong in ("11", "x", "nan"):
        assert f"/lam is {wrong}: lambda must be a number from 0 to 10" in after
    assert "/wrong: no such command" in after and after.count("/clear     forget what was said") == 2
    assert done.stderr == ""


def test_what_cannot_be_answered_is_said(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "w" * 300, "an apple")
    shown = tc_ray("chat", export, "--max-tokens", TOKENS).stdout
    assert "maximum context length is 256 tokens" in shown and "/clear begins anew." in shown
    assert "fused (lambda 0.5)> " in shown.partition("you> an apple")[2], "it goes on"
    copied = tmp_path / "export"
    shutil.copytree(export, copied)
    (copied / "pilot" / "chat_template.jinja").unlink()
    feed(monkeypatch, "an apple")
    assert "only a model with a chat template can chat" in tc_ray("chat", copied).stdout


def test_quit_ends_and_clear_forgets(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "an apple", "/clear", "an apple", "/quit", "never said")
    out = io.StringIO()
    run_chat(talk, Console(file=out, width=60))
    first, second = re.findall(r"you> an apple\n(.*?)\n(?=you> /)", out.getvalue(), flags=re.DOTALL)
    assert first == second and "never said" not in out.getvalue()


def test_a_wide_terminal_has_both_beside_each_other(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, "an apple")
    wide, narrow = io.StringIO(), io.StringIO()
    run_chat(talk, Console(file=wide, force_terminal=True, width=120, color_system=None))
    assert re.search(r"Pilot {20,}fused \(lambda 0\.5\)", wide.getvalue())
    feed(monkeypatch, "an apple")
    run_chat(talk, Console(file=narrow, force_terminal=True, width=60, color_system=None))
    assert "Pilot> " in narrow.getvalue() and "fused (lambda 0.5)> " in narrow.getvalue()


def test_a_run_that_has_no_export_is_refused(tmp_path: Path) -> None:
    done = tc_ray("chat", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert tc_ray("chat", tmp_path / "nowhere").stderr.startswith("tc-ray: ")


def test_ctrl_c_stops_an_answer_and_then_the_chat(tmp_path: Path) -> None:
    """In a real terminal; an answer of thousands of tokens would take minutes."""
    export = make_export(tmp_path, positions=200_000)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tc_ray.cli.main", "chat", str(export), "--max-tokens", "90000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
        start_new_session=True,
        close_fds=True,
    )
    os.close(theirs)
    seen = ""

    def until(words: str, seconds: float = 90) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while words not in seen:
            ready, _, _ = select.select([ours], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {words!r} in {seen[-2000:]!r}"
            seen += os.read(ours, 4096).decode("utf-8", "replace")
        seen = seen.partition(words)[2]

    try:
        for _ in range(2):  # a second signal ends other commands
            until("you> ")
            os.write(ours, b"an apple\n")
            until("fused (lambda 0.5)")
            time.sleep(1.2)
            os.kill(process.pid, signal.SIGINT)
            until("stopped; this exchange is forgotten")
        until("you> ")
        os.write(ours, b"/lam 0.3\n")
        until("fused with lambda 0.3")
        until("you> ")
        time.sleep(1)  # readline writes the prompt a moment before it listens: a signal between the two waits for a key
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
