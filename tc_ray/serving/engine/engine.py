"""Continuous batching of one fused model in a thread: requests join and leave the running batch at each token.

Invariant: every accepted request ends with exactly one last event unless it was cancelled, and what is cancelled stops
before the next token. `submit` alone decides whether a request has a place: `_taken` counts the accepted requests that have
not ended. What the thread computes stands in worker.py.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine.contract import Event, GenerationRequest, Load, Piece, Request, RequestHandle
from tc_ray.serving.engine.worker import Worker
from tc_ray.serving.errors import RequestError, queue_full, shutting_down

STALL_S = 120.0
"""An engine that has work and computed nothing for this long is unhealthy."""
FAILURES = 5
"""So is one with this many errors in a row and no completed request: while new requests come, their prompts are progress."""
PROBE_S = 30.0
"""An idle engine must generate its two tokens within this time."""
SOURCE_TOKENS = 512
"""Longest source of an encoder-decoder whose tokenizer names no length. T5 has no last position, but attention grows with the square."""
_NICENESS = 15
"""Of the engine's thread and torch's threads under it. The threads that answer clients need little time, but at once."""


class Turns:
    """A fair lock on what engines share: the processor, and a Pilot for which two Copilots are loaded. `with turns: ...`

    Engines get it in the order in which they asked, so none starves another.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next, self._now = 0, 0

    def __enter__(self) -> None:
        with self._changed:
            mine, self._next = self._next, self._next + 1
            self._changed.wait_for(lambda: self._now == mine)

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._now += 1
            self._changed.notify_all()


class Engine:
    """Generates and scores with one fused model.

    encoder_decoder: its prompts are sources, which take no room from what is generated. context_tokens: longest sequence, prompt and
    new tokens together, that the model has positions for; of an encoder-decoder, longest source and longest answer.
    tokenizer: used by the engine's thread alone. turn: shared by engines of one process (and needed by those of one Pilot).
    """

    def __init__(
        self, model: Any, tokenizer: Any, limits: ServingSection | None = None, *, turn: Turns | None = None
    ) -> None:
        self.limits = limits or ServingSection()
        self.model, self._turn = model, turn or Turns()
        self.encoder_decoder: bool = model.family.encoder_decoder
        self.context_tokens = _context_tokens(model.config, tokenizer, self.limits)
        self._changed = threading.Condition()
        self._worker = Worker(model, tokenizer, self.limits, self._changed)
        self._waiting: deque[RequestHandle] = deque()
        self._taken = 0
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._work, name="tc-ray-engine", daemon=True)
        self._thread.start()

    def room_after(self, prompt_tokens: int) -> int:
        """New tokens that a prompt of so many leaves room for."""
        return self.context_tokens - (0 if self.encoder_decoder else prompt_tokens)

    def submit(self, requests: Sequence[Request], deliver: Callable[[int, Event], None]) -> list[RequestHandle]:
        """Queue requests, all or none. `deliver` gets the index of a request and its events, in the engine's thread.

        Raises RequestError: 429 when too few places are free, 503 when the engine is closing or dead, 400 for more requests
        than there are places and for one that can never fit.
        """
        most = self.limits.max_running + self.limits.max_waiting
        if len(requests) > most:
            raise RequestError(
                f"The request needs {len(requests)} places, and the server has {most}; ask for fewer choices or prompts.",
                param="n",
                code="too_many_choices",
            )
        for request in requests:
            self._check_fits(request)
        with self._changed:
            if self._closing:
                raise shutting_down()
            if self._ended or not self._thread.is_alive():
                raise RequestError("The engine has stopped.", status=503, code="worker_stopped")
            if len(requests) > self.free_places():
                raise queue_full()
            return self._accept(requests, deliver)

    def free_places(self) -> int:
        """How many more requests are taken now."""
        return max(0, self.limits.max_running + self.limits.max_waiting - self._taken)

    def unhealthy(self) -> str | None:
        """What is wrong, None when all is well.

        An idle engine is made to generate two tokens with the Copilot, one from the prompt and one in the batch, so this may
        take a while. A busy one must have computed something lately, and must not have failed time after time.
        """
        if self._ended or not self._thread.is_alive():
            return "the engine has stopped"
        if self._busy():
            if self._worker.failures >= FAILURES:
                return f"the engine failed {self._worker.failures} times, and no request was done in between"
            still_s = time.monotonic() - self._worker.last_progress_s
            return f"the engine has given no token for {still_s:.0f} s" if still_s > STALL_S else None
        events: queue.Queue[Event] = queue.Queue()
        with self._changed:
            if self._closing:
                return None
            lam = float(self.model.default_lam) or 1.0
            probe = GenerationRequest((next(iter(self._worker.end_ids), 0),), 2, lam=lam, ignore_end=True)
            [handle] = self._accept([probe], lambda _, event: events.put(event))
        until = time.monotonic() + PROBE_S
        try:
            while isinstance(event := events.get(timeout=max(0.0, until - time.monotonic())), Piece):
                pass
        except queue.Empty:
            handle.cancel()
            return f"the engine did not generate two tokens within {PROBE_S:.0f} s"
        return event.message if isinstance(event, RequestError) else None

    def load(self) -> Load:
        """What it is doing now, and totals since its start."""
        with self._changed:
            return replace(self._worker.load(), waiting=len(self._waiting))

    def close(self, drain_s: float = 0.0) -> None:
        """Accept no more requests, let those under way continue for up to `drain_s`, fail the rest, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self._busy(), timeout=drain_s)
            self._ended = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _accept(self, requests: Sequence[Request], deliver: Callable[[int, Event], None]) -> list[RequestHandle]:
        """Queue requests for which there are places. The caller holds the lock."""

        def handle(number: int, request: Request) -> RequestHandle:
            return RequestHandle(request, lambda event: deliver(number, event), self._give_back)

        handles = [handle(number, request) for number, request in enumerate(requests)]
        if not self._busy():
            self._worker.progress()  # an idle engine has not stalled
        self._taken += len(handles)
        self._waiting.extend(handles)
        self._changed.notify_all()
        return handles

    def _give_back(self) -> None:
        with self._changed:
            self._taken -= 1

    def _check_fits(self, request: Request) -> None:
        if not isinstance(request, GenerationRequest):
            return
        if self._worker.batch.planned_bytes([self._worker.need_of(request)]) > self.limits.cache_bytes:
            raise RequestError(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones do not fit into the "
                "server's cache.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _busy(self) -> bool:
        return bool(self._waiting or len(self._worker))

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system allows it
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS))
        try:
            while True:
                with self._changed:
                    self._changed.notify_all()  # `close` may be waiting for the end of the work
                    self._changed.wait_for(lambda: self._busy() or self._ended)
                    if self._ended:
                        return
                with self._turn:
                    self._round()
        finally:
            # Also after an error that is no Exception: no client may wait for a dead thread.
            with self._changed:
                self._ended = True
                left = [*self._waiting, *self._worker.clear()]
                self._waiting.clear()
                self._changed.notify_all()
            for handle in left:
                handle.end(shutting_down())

    def _round(self) -> None:
        """Drop what nobody waits for, admit what fits in the order of arrival, and compute."""
        now_s = time.monotonic()
        with self._changed:
            self._waiting = deque(handle for handle in self._waiting if not handle.gone(now_s))
        self._worker.drop_gone(now_s)
        while self._waiting and self._worker.fits(self._waiting[0].request):
            with self._changed:
                self._worker.admit(self._waiting.popleft())
        self._worker.round()


def _context_tokens(config: Any, tokenizer: Any, limits: ServingSection) -> int:
    """See `Engine`. transformers gives a tokenizer that names no length a very large one."""
    if not config.is_encoder_decoder:
        return int(config.max_position_embeddings)
    named = int(tokenizer.model_max_length)
    return max(limits.max_prompt_tokens or 0, named if named < 10**6 else SOURCE_TOKENS)
