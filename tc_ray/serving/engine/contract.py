"""The engine's interface: requests in, events out. Plain data, no torch.

Invariant: each accepted generation or scoring ends with exactly one `Finished`, `Scored` or `RequestError`, unless it was
cancelled; what is cancelled stops within one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tc_ray.serving.errors import RequestError


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. temperature 0 is greedy; top_k None and top_p 1 do not cut; lam None is the exported one.

    seed: None draws one. bias: (id, what is added to its logit). repetition_penalty: 1 changes nothing. end_ids: tokens that end it
    beside the model's own, which do not with ignore_end; before min_new_tokens none of them is drawn. logprobs: None for none, else
    how many of the likeliest tokens to name beside the chosen one. explain: report what the Pilot would have chosen. owner: whose
    prompt it is; only prompts of one owner share computed beginnings. deadline_s: `time.monotonic()` at which it fails.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    end_ids: frozenset[int] = frozenset()
    min_new_tokens: int = 0
    lam: float | None = None
    logprobs: int | None = None
    explain: bool = False
    ignore_end: bool = False
    owner: bytes = b""
    deadline_s: float | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities of `ids[start:]` given `ids[:start]`, 1 <= start <= len(ids). top: likeliest tokens to name.

    before: of `ids[1:start]` too, with the Pilot alone (decoder-only). owner: as of a generation.
    """

    ids: tuple[int, ...]
    start: int
    lam: float | None = None
    top: int = 0
    deadline_s: float | None = None
    before: bool = False
    owner: bytes = b""


@dataclass(frozen=True)
class Explained:
    """What the correction did at one token. pilot_id: likeliest token of the Pilot. pilot, fused: p^ and p~ of the chosen token,
    before temperature. moved: total variation distance of p^ and p~, 0 to 1."""

    pilot_id: int
    pilot: float
    fused: float
    moved: float


@dataclass(frozen=True)
class Token:
    """One generated token. logprob: log p~ of it, before temperature (None: not asked for); top: (id,
    log p~) of the likeliest, best first. A log of 0 is -inf."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    explained: Explained | None = None


@dataclass(frozen=True)
class Piece:
    """One more token was generated: the text that is certain now, perhaps empty, and the tokens that belong to it."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end: `stop` for an end token or a stop string, `length` for max_new_tokens."""

    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ScoredToken:
    """log p^ and log p~ of a given token, and (id, log p~) of the likeliest ones at its place, best first."""

    id: int
    pilot: float
    fused: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Scored:
    """The scores of a ScoreRequest: one entry for each of `ids[start:]`, or of `ids[1:]` with `before`."""

    tokens: tuple[ScoredToken, ...]


Event = Piece | Finished | Scored | RequestError
"""RequestError: it broke off. The message is for the client; the details are in the server's log."""
Request = GenerationRequest | ScoreRequest


class RequestHandle:
    """An accepted request. Its caller can only cancel it, from any thread; the rest is called in the engine's thread.

    give_back: frees its place in the engine.
    """

    def __init__(self, request: Request, deliver: Callable[[Event], None], give_back: Callable[[], None]) -> None:
        self.request = request
        self._deliver, self._give_back = deliver, give_back
        self.cancelled = False
        """Nobody waits for it any more."""
        self._ended = False

    def cancel(self) -> None:
        """Leave the queue, or stop before the next token. Harmless after the end."""
        self.cancelled = True

    def send(self, event: Event) -> None:
        """Deliver an event. A receiver that raises counts as gone."""
        if self.cancelled:
            return
        try:
            self._deliver(event)
        except Exception:  # noqa: BLE001 - most often the event loop of a replica that has been stopped
            self.cancel()

    def end(self, event: Event) -> None:
        """Deliver the last event. The place is free before: the client may send its next request at once."""
        if not self._ended:
            self._ended = True
            self._give_back()
            self.send(event)

    def gone(self, now_s: float) -> bool:
        """Whether it was cancelled, or is past its deadline and ends here. now_s: `time.monotonic()`."""
        deadline_s = self.request.deadline_s
        if not self.cancelled and (deadline_s is None or now_s < deadline_s):
            return False
        self.end(RequestError("The request was not done by its deadline.", status=504, code="deadline_exceeded"))
        self.cancel()
        return True


@dataclass(frozen=True)
class Load:
    """The engine's load: sequences running and waiting, bytes of the caches and their limit."""

    running: int
    waiting: int
    cache_bytes: int
    cache_budget_bytes: int
    prompt_tokens: int = 0
    """Totals since the start: prompt tokens computed, tokens generated, prompt tokens reused, steps of the batch."""
    generated_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
