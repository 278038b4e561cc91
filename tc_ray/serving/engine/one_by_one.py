"""One thread that runs `generate` for one request after the other, behind a bounded queue.

Invariant: each accepted generation ends with exactly one `Finished` or `Failed`, unless it was cancelled; a cancelled
one stops within one token. The rest of serving knows only `Engine.submit`, `Engine.unhealthy`, `Engine.close` and the
events: a batching engine can take this one's place. The app delivers events to asyncio, the tests to a plain queue.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from tc_ray.serving.errors import RequestError
from tc_ray.serving.incremental_text import IncrementalText

logger = logging.getLogger(__name__)

STALL_S = 120.0
"""A running generation without a new token for so long counts as unhealthy."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. temperature 0 is greedy; top_k None and top_p 1 do not cut; lam None is the exported one."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    lam: float | None = None


@dataclass(frozen=True)
class Piece:
    """More text."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end: `stop` for an end token or a stop string, `length` for max_new_tokens."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The generation broke off; `message` is fit for the client, the details are in the server's log."""

    message: str


Event = Piece | Finished | Failed


class Generation:
    """An accepted request; the caller's side can only cancel it. `aborted`: the engine is closing."""

    def __init__(
        self, request: GenerationRequest, deliver: Callable[[Event], None], drop: Callable[[Generation], None]
    ):
        self.request = request
        self.cancelled = False
        self.aborted = False
        self._deliver = deliver
        self._drop = drop

    def cancel(self) -> None:
        """Nobody waits any more: leave the queue, or stop at the next token. Harmless after the end."""
        self.cancelled = True
        self._drop(self)

    def send(self, event: Event) -> None:
        """Hand an event over, from the worker thread. A receiver that cannot take it has gone."""
        if self.cancelled:
            return
        try:
            self._deliver(event)
        except Exception:
            # Most often the event loop of a replica that has been stopped.
            logger.exception("generation cancelled: its receiver is gone")
            self.cancelled = True


class _Watch(StoppingCriteria):
    """Sees each new token inside `generate`: sends text, and stops at stop strings and cancellation."""

    def __init__(
        self, generation: Generation, tokenizer: Any, end_ids: frozenset[int], beat: Callable[[], None]
    ) -> None:
        request = generation.request
        self._generation = generation
        self._end_ids = end_ids
        self._beat = beat
        self._text = IncrementalText(tokenizer, request.prompt_ids, request.stops)
        self._seen = len(request.prompt_ids)
        self._ended = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """bool [1]: whether to stop. `input_ids` [1, prompt + new]."""
        self._beat()
        self.observe(input_ids)
        stop = self._text.stopped or self._generation.cancelled or self._generation.aborted
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def observe(self, input_ids: torch.Tensor) -> None:
        """Take the ids that were not seen before."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        self._ended = self._ended or any(token in self._end_ids for token in new)
        self._send(self._text.push(token for token in new if token not in self._end_ids))

    def finish(self) -> None:
        """Send what is left and the end."""
        self._send(self._text.finish())
        prompt = len(self._generation.request.prompt_ids)
        reason: Literal["stop", "length"] = "stop" if self._ended or self._text.stopped else "length"
        self._generation.send(Finished(reason, prompt, self._seen - prompt))

    def _send(self, text: str) -> None:
        if text:
            self._generation.send(Piece(text))


class Engine:
    """Runs generations on a fused model.

    Args:
        model: a FusedModel, or a causal model whose `generate` takes `lam`. tokenizer: used by the worker thread alone.
        max_queued: generations that may wait while one runs.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_queued: int = 32) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_queued = max_queued
        self._end_ids = _end_ids(model, tokenizer)
        self._pending: deque[Generation] = deque()
        self._running: Generation | None = None
        self._closed = False
        self._last_progress_s = time.monotonic()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="tc-ray-generate", daemon=True)
        self._thread.start()

    @property
    def context_tokens(self) -> int:
        """Longest sequence, prompt and new tokens together, that the model has positions for."""
        return int(self._model.config.max_position_embeddings)

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], None]) -> Generation:
        """Queue a generation; its events go to `deliver`, called from the worker thread.

        Raises RequestError 429 when the queue is full and 503 when the worker has stopped.
        """
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise RequestError("The generation worker has stopped.", status=503, code="worker_stopped")
            if len(self._pending) >= self._max_queued:
                raise RequestError(
                    f"{self._max_queued} requests are waiting already; try again later.",
                    status=429,
                    code="queue_full",
                    retry_after_s=1,
                )
            generation = Generation(request, deliver, self._drop)
            self._pending.append(generation)
            self._changed.notify()
            return generation

    def unhealthy(self) -> str | None:
        """What is wrong, None when all is well."""
        if not self._thread.is_alive():
            return "the generation worker has stopped"
        with self._changed:
            stalled_s = time.monotonic() - self._last_progress_s
            if self._running is not None and stalled_s > STALL_S:
                return f"the running generation has given no token for {stalled_s:.0f} s"
        return None

    def close(self) -> None:
        """Stop the worker: the running generation ends at its next token, and each unfinished one fails."""
        with self._changed:
            self._closed = True
            if self._running is not None:
                self._running.aborted = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _drop(self, generation: Generation) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._pending.remove(generation)

    def _beat(self) -> None:
        self._last_progress_s = time.monotonic()

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closed)
                    if self._closed:
                        return
                    generation = self._running = self._pending.popleft()
                    self._beat()
                self._generate(generation)
                with self._changed:
                    self._running = None
        finally:
            # Also reached when something that is no Exception ends the thread: nobody is left waiting.
            with self._changed:
                self._closed = True
                left = [*([self._running] if self._running else []), *self._pending]
                self._running = None
                self._pending.clear()
            for generation in left:
                generation.send(Failed("The generation worker has stopped."))

    def _generate(self, generation: Generation) -> None:
        request = generation.request
        watch = _Watch(generation, self._tokenizer, self._end_ids, self._beat)
        sampling: dict[str, Any] = {"do_sample": False}
        if request.temperature > 0:
            # top_k 0 switches it off: left out, transformers would cut to 50.
            top_k = request.top_k or 0
            sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": top_k}
        try:
            ids = torch.tensor([request.prompt_ids], dtype=torch.long, device=self._model.device)
            with torch.inference_mode(), _seeded(request.seed):
                out = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=request.max_new_tokens,
                    stopping_criteria=StoppingCriteriaList([watch]),
                    eos_token_id=sorted(self._end_ids) or None,
                    pad_token_id=min(self._end_ids, default=0),
                    lam=request.lam,
                    **sampling,
                )
            if generation.aborted:
                generation.send(Failed("The server is shutting down."))
                return
            watch.observe(out)
            watch.finish()
        except Exception as error:
            logger.exception("generation failed (%d prompt tokens)", len(request.prompt_ids))
            generation.send(Failed(f"Generation failed in the server ({type(error).__name__})."))


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from `seed` and leave the process's own random state as it was; None draws from the latter."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's and those of the model's generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *listed] if token is not None)
