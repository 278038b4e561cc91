"""What the engine and the rest of serving say to each other: requests in, events out. Plain data, no torch.

Invariant: each accepted generation or scoring ends with exactly one `Finished`, `Scored` or `Failed`, unless it was
cancelled; what is cancelled stops within one token. Used by the engine, the app and the tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. temperature 0 is greedy; top_k None and top_p 1 do not cut; lam None is the exported one.

    seed None draws one. presence_penalty, frequency_penalty: subtracted from the fused logits of tokens generated before,
    once and once an occurrence. logprobs: None for none, else how many of the likeliest tokens to name beside the chosen
    one (0: none). explain: report what the Pilot would have said. ignore_end: end tokens do not end it (for checks).
    owner: whose prompt it is; only prompts of the same owner are begun with one another's. deadline_s: `time.monotonic()` at
    which it fails.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    lam: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    explain: bool = False
    ignore_end: bool = False
    owner: bytes = b""
    deadline_s: float | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities of `ids[start:]` given `ids[:start]`, 1 <= start <= len(ids). top: likeliest tokens to name beside."""

    ids: tuple[int, ...]
    start: int
    lam: float | None = None
    top: int = 0
    deadline_s: float | None = None


@dataclass(frozen=True)
class Explained:
    """What the correction did at one token: probabilities before and after it, of distributions before temperature.

    pilot_id: likeliest token of the Pilot. pilot, fused: p^ and p~ of the token said. moved: total variation distance of p^
    and p~, 0 to 1.
    """

    pilot_id: int
    pilot: float
    fused: float
    moved: float


@dataclass(frozen=True)
class Token:
    """One generated token. logprob: log p~ of it, before penalties and temperature (None: not asked for); top: (id,
    log p~) of the likeliest, best first. A log of 0 is -inf."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    explained: Explained | None = None


@dataclass(frozen=True)
class Piece:
    """More text, perhaps none, and the tokens generated since the piece before: their text may come with a later piece."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end: `stop` for an end token or a stop string, `length` for max_new_tokens."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""


@dataclass(frozen=True)
class ScoredToken:
    """log p^ and log p~ of a given token, and (id, log p~) of the likeliest ones at its place, best first."""

    id: int
    pilot: float
    fused: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Scored:
    """The answer to a ScoreRequest: one entry for each of `ids[start:]`."""

    tokens: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Failed:
    """It broke off; `message` is fit for the client, the details are in the server's log."""

    message: str
    code: Literal["generation_failed", "deadline_exceeded", "shutting_down"] = "generation_failed"
    status: int = 500


Event = Piece | Finished | Scored | Failed
Request = GenerationRequest | ScoreRequest


class Ticket:
    """An accepted request; its caller can only cancel it, from any thread."""

    def __init__(self, request: Request, deliver: Callable[[Event], None]) -> None:
        self.request = request
        self._deliver = deliver
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Nobody waits for it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Leave the queue, or stop before the next token. Harmless after the end."""
        self._cancelled.set()

    def send(self, event: Event) -> None:
        """Hand an event over, from the engine's thread. A receiver that cannot take it has gone."""
        if self.cancelled:
            return
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001 - most often the event loop of a replica that has been stopped
            self.cancel()


@dataclass(frozen=True)
class Load:
    """What the engine is doing at a moment: requests at work and waiting, bytes of the caches, allowed, and of kept prompts."""

    running: int
    waiting: int
    cache_bytes: int
    cache_budget_bytes: int
    prefix_bytes: int = 0
    prompt_tokens: int = 0
    """Totals since the start: prompt tokens computed, tokens generated, prompt tokens reused, steps of the batch."""
    generated_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
