"""The chat as a person sees it: lines in, both answers out while they come, and the commands that begin with /.

Invariant: what a model writes cannot steer the terminal. Ctrl-C stops an answer; between answers it ends the chat, as the end
of the input does. Without a terminal, lines are read and answers are printed one after the other. Called by `tc-ray chat`.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tc_ray.serving.chat.conversation import FUSED, Conversation
from tc_ray.serving.errors import RequestError
from tc_ray.text import visible

SIDE_BY_SIDE = 80
"""Columns of a terminal from which on the answers stand beside each other."""
PROMPT = "you> "
_ADVICE = {
    "context_length_exceeded": " /clear begins anew.",
    "no_chat_template": " That is a route of `tc-ray serve`: only a model with a chat template can chat.",
}
"""What to do about errors, by their code."""
HELP = """/lam 0.5   weight of the Copilot's correction from now on; 0 is the Pilot alone; /lam shows it
/clear     forget what was said
/quit      end (also Ctrl-D); Ctrl-C stops an answer
anything else is said to both models, each of which goes on from its own answers"""


def run_chat(conversation: Conversation, console: Console | None = None) -> None:
    """Talk until /quit, the end of the input, or Ctrl-C between answers. console: default standard output."""
    console = console or Console(highlight=False)
    _say(console, f"{conversation.name}: {_lambda_line(conversation)}; /help shows the commands")
    with _plain_interrupts():
        for line in _lines(console):
            message = line.strip()
            if message == "/quit":
                return
            if message.startswith("/"):
                _say(console, _command(conversation, message))
            elif message:
                _answer(conversation, message, console)


def _command(conversation: Conversation, message: str) -> str:
    """Do what a command says; returns what to show."""
    name, *words = message.split()
    if name == "/lam" and len(words) < 2:
        try:
            if words:
                conversation.set_lam(words[0])
        except ValueError as error:
            return str(error)
        return _lambda_line(conversation)
    if name == "/clear" and not words:
        conversation.clear()
        return "forgotten"
    if name == "/help":
        return HELP
    return f"{message}: no such command\n{HELP}"


def _lambda_line(conversation: Conversation) -> str:
    if conversation.lam:
        return f"Pilot, and fused with lambda {conversation.lam:g}"
    return "lambda 0, the Pilot alone; /lam 0.5 shows the Copilot's correction beside it"


def _answer(conversation: Conversation, message: str, console: Console) -> None:
    """Show both answers while they come."""
    wide = console.is_terminal and console.width >= SIDE_BY_SIDE and len(conversation.sides) > 1
    pieces = conversation.ask(message)
    try:
        with contextlib.closing(pieces):
            (_beside if wide else _below)(conversation, pieces, console)
    except RequestError as error:
        _say(console, f"\n{error.message}{_ADVICE.get(str(error.code), '')}")
    except KeyboardInterrupt:
        _say(console, "\nstopped; this exchange is forgotten")


def _beside(conversation: Conversation, pieces: Iterator[tuple[str, str]], console: Console) -> None:
    texts = dict.fromkeys(conversation.sides, "")

    def table() -> Table:
        made = Table(expand=True, box=None, padding=(0, 1), show_edge=False)
        for side in texts:
            made.add_column(_title(conversation, side), ratio=1, overflow="fold")
        made.add_row(*(Text(_shown(text)) for text in texts.values()))
        return made

    # what grows is taken off the screen at the end, as lines beyond its height cannot be drawn anew
    try:
        with Live(console=console, refresh_per_second=10, transient=True, get_renderable=table):
            for side, text in pieces:
                texts[side] += text
    finally:
        for side in conversation.cut:
            texts[side] += " ..."
        console.print(table())


def _below(conversation: Conversation, pieces: Iterator[tuple[str, str]], console: Console) -> None:
    """The first side's answer while it comes, then what the other one has, and its rest."""
    texts = dict.fromkeys(conversation.sides, "")
    order = list(conversation.sides)
    shown = dict(texts)
    _print(console, f"{_title(conversation, order[0])}> ")
    for side, text in pieces:
        texts[side] += text
        if side == order[0]:
            _print(console, text)
            shown[side] = texts[side]
    for side in order:
        if side != order[0]:
            _print(console, f"\n{_title(conversation, side)}> ")
        _print(console, texts[side][len(shown[side]) :] + (" ..." if side in conversation.cut else ""))
    _print(console, "\n")


def _title(conversation: Conversation, side: str) -> str:
    return f"{side} (lambda {conversation.lam:g})" if side == FUSED else side


def _shown(text: str) -> str:
    return visible(text.replace("\t", "    "))


def _say(console: Console, text: str) -> None:
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


def _print(console: Console, text: str) -> None:
    console.print(_shown(text), markup=False, highlight=False, soft_wrap=True, end="")
    console.file.flush()


def _lines(console: Console) -> Iterator[str]:
    """What the person types, with the terminal's editing; else the lines of standard input, shown as they are read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and earlier lines in `input`
    while True:
        try:
            if sys.stdin.isatty():
                line = input(PROMPT)
            else:
                line = sys.stdin.readline()
                if not line:
                    return
                _say(console, PROMPT + line.rstrip("\r\n"))
        except (EOFError, KeyboardInterrupt):
            _say(console, "")
            return
        # a byte that is no UTF-8 came as half a surrogate pair
        yield line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt each time: elsewhere the second signal ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
