"""Continuous batching of one fused model in a thread: requests join and leave the running batch at each token.

Invariant: every accepted request ends with exactly one last event unless it was cancelled, and what is cancelled stops
before the next token; the caches never pass `limits.cache_bytes` (but while one is moved to a larger block, of which both are
there for a moment): a sequence is admitted when it fits to its last token, in the order of arrival. An error in the batch fails
those in it and no others. The app knows `submit`, `unhealthy`, `load` and `close`; everything about models stands in
`FusedBatch`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Any

import torch

from tc_ray.config.serving import ServingSection
from tc_ray.models.finite import NotFiniteError
from tc_ray.serving.engine.batch import FusedBatch, Prefill, Room
from tc_ray.serving.engine.contract import Event, Failed, GenerationRequest, Load, Piece, Request, Scored, Ticket
from tc_ray.serving.engine.prefixes import Prefixes
from tc_ray.serving.engine.scoring import scored
from tc_ray.serving.engine.sequence import Sequence, end_ids_of
from tc_ray.serving.engine.turns import Turns
from tc_ray.serving.errors import RequestError

logger = logging.getLogger(__name__)
_NOT_FINITE = "logits that are not finite"  # NaN is the largest to `max`; a token whose p~ is 0 has -inf

STALL_S = 120.0
"""Work under way without any progress for so long counts as unhealthy."""
FAILURES = 5
"""Errors one after the other, and no request done between them, count too: while new ones come, their prompts are progress."""
PROBE_S = 30.0
"""An idle engine must generate its two tokens within this."""
_NICENESS = 15
"""Of the engine's thread and torch's under it, beside those that answer clients: they need little, but at once."""


class Engine:
    """Generates and scores with one fused model.

    Args:
        model: a decoder-only FusedModel. tokenizer: used by the engine's thread alone.
        limits: what it holds at once. turn: shared by engines of one process (and needed by those of one Pilot).
    """

    def __init__(
        self, model: Any, tokenizer: Any, limits: ServingSection | None = None, *, turn: Turns | None = None
    ) -> None:
        self.limits = limits or ServingSection()
        self._model, self._tokenizer, self._turn = model, tokenizer, turn or Turns()
        self._end_ids = end_ids_of(model, tokenizer)
        self._batch = FusedBatch(model)
        self._prefixes = Prefixes(self.limits.prefix_bytes)
        self._waiting: deque[Ticket] = deque()
        self._joining: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        """In the order of the batch's rows."""
        self._scoring: deque[tuple[Ticket, Iterator[Scored | None]]] = deque()
        self._closing = self._ended = False
        self._totals = Load(0, 0, 0, self.limits.cache_bytes)
        self._last_progress_s = time.monotonic()
        self._failures = 0
        """Since the last request that was done."""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tc-ray-engine", daemon=True)
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        """Longest sequence, prompt and new tokens together, that the model has positions for."""
        return int(self._model.config.max_position_embeddings)

    # -- what the app calls, from any thread ----------------------------------------------------------------------

    def submit(self, requests: Many[Request], deliver: Callable[[int, Event], None]) -> list[Ticket]:
        """Queue requests, all or none; `deliver(i, event)` is called from the engine's thread for request i.

        Raises:
            RequestError: 429 when too many wait, 503 when the engine is closing or dead, 400 for what can never fit.
        """
        for request in requests:
            self._check_fits(request)
        places = self.limits.max_running + self.limits.max_waiting
        if len(requests) > places:
            raise RequestError(
                f"The request needs {len(requests)} places, and the server has {places}; ask for fewer choices or prompts.",
                param="n",
                code="too_many_choices",
            )
        with self._changed:
            self._check_open()
            free = self.free_places()
            if len(requests) > free:
                raise RequestError(
                    f"{places - free} generations run or wait already, "
                    f"{len(requests)} more are too many; try again later.",
                    status=429,
                    code="queue_full",
                    retry_after_s=1,
                )
            return self._queue(requests, deliver)

    def free_places(self) -> int:
        """Generations that would be accepted now: cheap enough to ask before anything else is done for a request."""
        with self._changed:
            # a client that has got its end may ask again before the batch is rid of the old row
            held = sum(not sequence.ended for sequence in (*self._joining, *self._running))
            under_way = held + len(self._waiting) + len(self._scoring)
        return max(0, self.limits.max_running + self.limits.max_waiting - under_way)

    def unhealthy(self) -> str | None:
        """What is wrong, None when all is well.

        An idle engine is made to generate two tokens with the Copilot, one from the prompt and one in the batch, so this may
        take a while; a busy one must have computed something lately, and must not have failed time after time.
        """
        if self._ended or not self._thread.is_alive():
            return "the engine has stopped"
        if self._busy():
            if self._failures >= FAILURES:
                return f"the engine failed {self._failures} times, and no request was done in between"
            still_s = time.monotonic() - self._last_progress_s
            return f"the engine has given no token for {still_s:.0f} s" if still_s > STALL_S else None
        events: queue.Queue[Event] = queue.Queue()
        with self._changed:
            if self._closing:
                return None
            lam = float(self._model.default_lam) or 1.0
            probe = GenerationRequest((next(iter(self._end_ids), 0),), 2, lam=lam, ignore_end=True)
            [ticket] = self._queue([probe], lambda _, event: events.put(event))
        until = time.monotonic() + PROBE_S
        try:
            while isinstance(event := events.get(timeout=max(0.0, until - time.monotonic())), Piece):
                pass
        except queue.Empty:
            ticket.cancel()
            return f"the engine did not generate two tokens within {PROBE_S:.0f} s"
        return event.message if isinstance(event, Failed) else None

    def load(self) -> Load:
        """What it is doing now, and totals since its start."""
        with self._changed:
            return replace(
                self._totals,
                running=len(self._running) + len(self._joining) + len(self._scoring),
                waiting=len(self._waiting),
                cache_bytes=self._batch.nbytes,
                prefix_bytes=self._prefixes.nbytes,
            )

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those under way go on for up to `drain_s`, fail the rest, end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended or not self._busy(), timeout=drain_s)
            self._ended = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    # -- queue ----------------------------------------------------------------------------------------------------

    def _queue(self, requests: Many[Request], deliver: Callable[[int, Event], None]) -> list[Ticket]:
        def to(number: int) -> Callable[[Event], None]:
            return lambda event: deliver(number, event)

        tickets = [Ticket(request, to(number)) for number, request in enumerate(requests)]
        if not self._busy():
            self._progress()  # what was idle has not stalled
        self._waiting.extend(tickets)
        self._changed.notify_all()
        return tickets

    def _check_open(self) -> None:
        if self._closing:
            raise RequestError("The server is shutting down.", status=503, code="shutting_down", retry_after_s=1)
        if self._ended or not self._thread.is_alive():
            raise RequestError("The engine has stopped.", status=503, code="worker_stopped")

    def _check_fits(self, request: Request) -> None:
        if not isinstance(request, GenerationRequest):
            return
        if self._batch.planned_bytes([self._room(request)]) > self.limits.cache_bytes:
            raise RequestError(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones do not fit into the "
                "server's cache.",
                param="max_tokens",
                code="context_length_exceeded",
            )

    def _lam(self, request: GenerationRequest) -> float:
        return float(self._model.default_lam if request.lam is None else request.lam)

    def _room(self, request: GenerationRequest) -> Room:
        return self._batch.room(len(request.prompt_ids), request.max_new_tokens, self._lam(request) != 0)

    def _busy(self) -> bool:
        return bool(self._waiting or self._joining or self._running or self._scoring)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # as the system allows
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
            # also reached when something that is no Exception ends the thread: nobody is left waiting
            with self._changed:
                self._ended = True
                left = [*self._waiting, *(ticket for ticket, _ in self._scoring)]
                left += [sequence.ticket for sequence in (*self._joining, *self._running)]
                for held in (self._waiting, self._joining, self._running, self._scoring):
                    held.clear()
                self._changed.notify_all()
            for ticket in left:
                ticket.send(Failed("The server is shutting down.", "shutting_down", 503))

    def _progress(self) -> None:
        self._last_progress_s = time.monotonic()

    def _count(self, **more: int) -> None:
        self._progress()
        self._totals = replace(self._totals, **{name: getattr(self._totals, name) + n for name, n in more.items()})

    def _round(self) -> None:
        """Let go who is gone, let in who fits, compute some prompts, one token for all, and some scores."""
        self._drop_gone()
        self._admit()
        self._compute_prompts()
        if self._running:
            self._step()
        if self._scoring:
            self._score()

    def _drop_gone(self) -> None:
        now = time.monotonic()
        with self._changed:
            self._waiting = deque(ticket for ticket in self._waiting if not _over(ticket, now))
        self._joining = deque(sequence for sequence in self._joining if not _over(sequence.ticket, now))
        self._scoring = deque(item for item in self._scoring if not _over(item[0], now))
        for row in reversed(range(len(self._running))):
            if _over(self._running[row].ticket, now):
                self._leave(row)

    def _admit(self) -> None:
        rooms = [sequence.room for sequence in (*self._joining, *self._running)]
        while self._waiting:
            ticket = self._waiting[0]
            if isinstance(ticket.request, GenerationRequest):
                room = self._room(ticket.request)
                full = len(rooms) >= self.limits.max_running
                if full or self._batch.planned_bytes([*rooms, room]) > self.limits.cache_bytes:
                    return
                rooms.append(room)
                end_ids = frozenset() if ticket.request.ignore_end else self._end_ids
                sequence = Sequence(ticket, self._tokenizer, end_ids, self._lam(ticket.request), room)
                with self._changed:
                    self._waiting.popleft()
                    self._joining.append(sequence)
            else:
                with self._changed:
                    parts = scored(self._model, ticket.request, self.limits.prefill_tokens)
                    self._scoring.append((self._waiting.popleft(), parts))

    def _compute_prompts(self) -> None:
        left = self.limits.prefill_tokens
        while self._joining and left > 0:
            sequence = self._joining[0]
            stays = False
            try:
                prefill = sequence.prefill or self._begin(sequence)
                computed = prefill.advance(left)
                left -= computed
                self._count(prompt_tokens=computed)
                stays = not prefill.done or self._join(sequence, prefill)
            except Exception as error:  # noqa: BLE001 - logged, and told to the client
                self._fail(error, [sequence.ticket])
            if not stays:
                self._joining.popleft()

    def _begin(self, sequence: Sequence) -> Prefill:
        ids, owner = sequence.request.prompt_ids, sequence.request.owner
        prefill = self._batch.prefill(ids, sequence.lam, prefix=self._prefixes.longest(ids, owner))
        self._count(cached_tokens=prefill.reused)
        sequence.start(prefill)
        return prefill

    def _join(self, sequence: Sequence, prefill: Prefill) -> bool:
        """Say the first token of a computed prompt; whether there is more to say, in the batch."""
        pilot, fused = prefill.pilot[0], prefill.fused[0]
        if not fused.max().isfinite():
            raise NotFiniteError(_NOT_FINITE)
        self._prefixes.keep(
            prefill, sequence.request.owner
        )  # after the look: what is spoilt must not spoil later requests
        chosen = int(fused.argmax()) if sequence.sampler.is_argmax else sequence.sampler.choose(fused)
        self._count(generated_tokens=1)
        if sequence.say(chosen, pilot, fused):
            self._failures = 0
            return False
        try:
            self._batch.reserve([other.room for other in (*self._running, sequence)], self.limits.cache_bytes)
            self._batch.join(prefill)
        except Exception as error:
            self._begin_anew(error)
            raise
        sequence.prefill = None  # its keys and values are in the batch now
        with self._changed:  # always counted, and once
            self._running.append(self._joining.popleft())
        return True

    def _step(self) -> None:
        ended, broken = [], []
        try:
            step = self._batch.step([sequence.last for sequence in self._running])
            best, likeliest = (found.tolist() for found in step.fused.max(1))
            for row, sequence in enumerate(self._running):
                if not math.isfinite(best[row]):
                    broken.append(row)
                    continue
                fused = step.fused[row]
                pilot = fused if step.pilot is step.fused else step.pilot[row]
                chosen = likeliest[row] if sequence.sampler.is_argmax else sequence.sampler.choose(fused)
                if sequence.say(chosen, pilot, fused):
                    ended.append(row)
        except Exception as error:  # noqa: BLE001 - as above
            self._begin_anew(error)
            return
        self._count(generated_tokens=len(self._running), steps=1)
        if ended:
            self._failures = 0
        if broken:
            self._fail(NotFiniteError(_NOT_FINITE), [self._running[row].ticket for row in broken])
        for row in sorted(ended + broken, reverse=True):
            self._leave(row)

    def _begin_anew(self, error: Exception) -> None:
        """The caches may be half written: everything in the batch ends here, and the next requests get a new one."""
        failed, self._running = self._running, []
        self._batch = FusedBatch(self._model)
        self._fail(error, [sequence.ticket for sequence in failed])

    def _fail(self, error: Exception, tickets: list[Ticket]) -> None:
        logger.error("generation failed", exc_info=error)
        self._failures += 1
        for ticket in tickets:
            ticket.send(Failed(f"Generation failed in the server ({type(error).__name__})."))

    def _leave(self, row: int) -> None:
        self._batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _score(self) -> None:
        ticket, work = self._scoring[0]
        try:
            with torch.inference_mode():
                found = next(work)
        except Exception as error:  # noqa: BLE001 - as above
            self._scoring.popleft()
            self._fail(error, [ticket])
            return
        self._progress()
        if found is not None:  # till then the next ones hold nothing: one text's states are in memory at a time
            self._failures = 0
            self._scoring.popleft()
            ticket.send(found)


def _over(ticket: Ticket, now_s: float) -> bool:
    """Whether nobody waits for it any more; tells who waited too long."""
    if ticket.cancelled:
        return True
    deadline_s = ticket.request.deadline_s
    if deadline_s is None or now_s < deadline_s:
        return False
    ticket.send(Failed("The request was not done by its deadline.", "deadline_exceeded", 504))
    ticket.cancel()
    return True
