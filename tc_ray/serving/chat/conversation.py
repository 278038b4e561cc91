"""A conversation with the Pilot and the fused model at once: each goes on from its own earlier answers.

Invariant: an exchange is kept only if every answer in it ended by itself; one that was stopped or failed leaves no trace. With
lambda 0 the fused model is the Pilot, so only that is asked. Called by `terminal`.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from tc_ray.config.section import MAX_LAM, check_lam
from tc_ray.config.serving import ServingSection
from tc_ray.serving.deploy.settings import find_export
from tc_ray.serving.engine.contract import Event, Finished, GenerationRequest, Piece
from tc_ray.serving.engine.engine import Turns
from tc_ray.serving.errors import RequestError
from tc_ray.serving.models.registry import LoadedRun, ServedModel
from tc_ray.serving.text.prompt import Room

PILOT, FUSED = "Pilot", "fused"


class Conversation:
    """lam: lambda of the fused answers, at first the exported one. cut: whose last answer ended at the most new tokens.

    max_tokens: most new tokens of an answer; at most half of the context.
    """

    def __init__(self, served: ServedModel, max_tokens: int) -> None:
        self._served = served
        self._max_tokens = min(max_tokens, served.engine.context_tokens // 2)
        self.name, self.lam = served.name, served.default_lam
        self.cut: set[str] = set()
        self._said: dict[str, list[dict[str, str]]] = {PILOT: [], FUSED: []}

    @property
    def sides(self) -> tuple[str, ...]:
        """Who answers now."""
        return (PILOT, FUSED) if self.lam else (PILOT,)

    def set_lam(self, text: str) -> None:
        """Take another lambda. Raises ValueError: no number that a lambda may be."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        self.lam = check_lam(value if 0 <= value <= MAX_LAM else text, "/lam")

    def clear(self) -> None:
        """Begin anew."""
        for said in self._said.values():
            said.clear()

    def ask(self, message: str) -> Generator[tuple[str, str], None, None]:
        """Pieces of the answers as they come: whose, and text. Raises RequestError, also for a conversation that is too long.

        Closing the iterator stops the answers.
        """
        engine = self._served.engine
        answer = 0 if engine.encoder_decoder else self._max_tokens  # a source takes no room from the answer
        room = Room(engine.context_tokens - answer, engine.context_tokens, answer)
        turn = {"role": "user", "content": message}
        requests = []
        for side in self.sides:
            ids = self._served.encoder.chat([*self._said[side], turn], room)
            most = min(self._max_tokens, engine.room_after(len(ids)))
            requests.append(GenerationRequest(ids, most, lam=self.lam if side == FUSED else 0.0))
        events: queue.Queue[tuple[int, Event]] = queue.Queue()
        handles = engine.submit(requests, lambda number, event: events.put((number, event)))
        answers, sides = dict.fromkeys(self.sides, ""), self.sides
        self.cut = set()
        left = len(handles)
        try:
            while left:
                number, event = events.get()
                if isinstance(event, RequestError):
                    raise event
                if isinstance(event, Piece) and event.text:
                    answers[sides[number]] += event.text
                    yield sides[number], event.text
                elif isinstance(event, Finished):
                    left -= 1
                    if event.finish_reason == "length":
                        self.cut.add(sides[number])
        finally:
            for handle in handles:
                handle.cancel()
        for side, said in self._said.items():
            said += [turn, {"role": "assistant", "content": answers.get(side, answers[PILOT])}]


@contextmanager
def open_conversation(folder: Path, max_tokens: int) -> Iterator[Conversation]:
    """A conversation with the models of a run folder or an export. Raises as `serve`'s start does: ServingError, ExportError."""
    disable_progress_bar()
    export = find_export(folder)
    name = (export.parent if export.name == "export" else export).name
    run = LoadedRun(name, export, ServingSection(), Turns())
    served = run.load_copilot(export)
    try:
        yield Conversation(served, max_tokens)
    finally:
        run.release(served.engine)
