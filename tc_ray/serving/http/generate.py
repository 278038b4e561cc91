"""What a body asks of the engine: prompts as ids, one engine request a choice, and one or two for an echoed prompt.

Invariant: everything that can be refused is refused here, with the field's name, before the engine is asked. Choices come
prompt by prompt; choice i of a prompt draws from seed + i. Used by the routes, in a worker thread.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from tc_ray.config.section import MAX_LAM
from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine import GenerationRequest, Request, Scored, ScoreRequest, Token
from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.http.requests import (
    DEFAULT_COMPLETION_TOKENS,
    MAX_STOP_CHARACTERS,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    split_prompts,
)
from tc_ray.serving.models.registry import ServedModel
from tc_ray.serving.text.prompt import PlacedPrompt

SEED_BITS = 53
"""Of a drawn seed, so that JSON in any language can hold it."""
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?", re.ASCII)


@dataclass(frozen=True)
class Terms:
    """What a request comes with besides its body.

    seed: to draw from where the body names none. score_after, lam: of the query, for clients that cannot say it in the body,
    which goes before. deadline_s: in `time.monotonic()`.
    """

    deadline_s: float
    seed: int | None = None
    score_after: str | None = None
    lam: float | None = None

    def weight(self, body: GenerationFields) -> float | None:
        """lambda of a request; None for the exported one."""
        asked = body.requested_lam()
        return self.lam if asked is None else asked


@dataclass
class Scoring:
    """The scores of one echoed prompt: the Pilot's of ids[1:border], the fused model's of ids[border:].

    before, after: places of the engine requests in the plan, None where there is nothing to score.
    """

    ids: tuple[int, ...]
    before: int | None
    after: int | None
    found: dict[int, Scored] = field(default_factory=dict)

    def take(self, place: int, scored: Scored) -> bool:
        """Keep one answer; true when all are there."""
        self.found[place] = scored
        return self.complete

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return all(place is None or place in self.found for place in (self.before, self.after))

    def tokens(self) -> list[Token]:
        """All tokens of the prompt; nothing is known of the first."""
        tokens = [Token(self.ids[0])]
        for place in (self.before, self.after):
            if place is not None:
                tokens += [Token(one.id, one.fused, one.top) for one in self.found[place].tokens]
        return tokens


@dataclass
class Plan:
    """What one request asks of one engine.

    requests: for `ServedModel.engine.submit`: first the generations, `n` for each prompt, then the scorings.
    echoes: of each prompt as text, empty without echo. scorings: of each echoed prompt, empty without its log-probabilities.
    prompt_tokens: of all prompts together. named_tokens, explain: what to tell of each token.
    """

    served: ServedModel
    requests: list[Request]
    n: int
    prompts: int
    generations: int
    seed: int
    prompt_tokens: int
    named_tokens: int | None
    explain: bool
    echoes: Sequence[PlacedPrompt] = ()
    scorings: Sequence[Scoring] = ()

    @property
    def choices(self) -> int:
        """Choices of the answer."""
        return self.n * self.prompts

    def scoring_of(self, place: int) -> tuple[int, Scoring]:
        """Prompt and scoring that engine request `place` belongs to."""
        return next((p, one) for p, one in enumerate(self.scorings) if place in (one.before, one.after))


def make_plan(served: ServedModel, body: CompletionRequest | ChatRequest, limits: ServingSection, terms: Terms) -> Plan:
    """Check a body and encode its prompts. Raises RequestError."""
    named, n = body.named_tokens(), body.n or 1
    if isinstance(body, CompletionRequest):
        body.check()
        given = split_prompts(body.prompt)
        if len(given) * n > limits.max_choices:
            raise _too_many(limits, "n" if n > 1 else "prompt", len(given) * n)
        prompt_field = "prompt"
    else:
        given, prompt_field = [], "messages"
        if n > limits.max_choices:
            raise _too_many(limits, "n", n)
    new_field, asked = body.token_limit()
    if asked is not None and asked > limits.max_tokens:
        raise invalid_value(new_field, f"this server generates at most {limits.max_tokens} tokens a choice")
    room = served.engine.context_tokens - (1 if asked is None else asked)
    limit = min(room, limits.max_prompt_tokens or room)
    if limit < 1:
        raise RequestError(
            f"Field `{new_field}`: the model has {served.engine.context_tokens} positions for prompt and new tokens.",
            param=new_field,
            code="context_length_exceeded",
        )
    if isinstance(body, CompletionRequest):
        prompts = [served.encoder.prompt(one, limit, prompt_field) for one in given]
    else:
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        prompts = [served.encoder.chat(messages, limit)]
    seed = body.seed if body.seed is not None else terms.seed
    if seed is None:
        seed = secrets.randbits(SEED_BITS)
    default = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else limits.max_tokens
    requests: list[Request] = []
    for ids in prompts if asked != 0 else ():
        new = asked or min(default, limits.max_tokens, served.engine.context_tokens - len(ids))
        requests += [_generation(body, ids, new, seed + i, named, terms) for i in range(n)]
    plan = Plan(served, requests, n, len(prompts), len(requests), seed, sum(map(len, prompts)), named, body.explains())
    if isinstance(body, CompletionRequest) and body.echo:
        plan.echoes = [served.encoder.placed(one, ids) for one, ids in zip(given, prompts, strict=True)]
        if body.scores_prompt():
            _plan_scoring(plan, body, prompts, terms)
    return plan


def _too_many(limits: ServingSection, param: str, choices: int) -> RequestError:
    return invalid_value(param, f"{choices} choices are asked for, and this server gives at most {limits.max_choices}")


def _generation(
    body: CompletionRequest | ChatRequest, ids: tuple[int, ...], new: int, seed: int, named: int | None, terms: Terms
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=ids,
        max_new_tokens=new,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        seed=seed,
        stops=body.stops(),
        lam=terms.weight(body),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logprobs=named,
        explain=body.explains(),
        deadline_s=terms.deadline_s,
    )


def _plan_scoring(plan: Plan, body: CompletionRequest, prompts: Sequence[tuple[int, ...]], terms: Terms) -> None:
    """Add the requests that score each echoed prompt. The Copilot reads from `border` on; the Pilot stands for all before."""
    marker, param = terms.score_after, "score_after"
    if body.copilot is not None and body.copilot.score_after is not None:
        marker, param = body.copilot.score_after, "copilot.score_after"
    lam, top = terms.weight(body), plan.named_tokens or 0
    scorings = []
    for ids, echo in zip(prompts, plan.echoes, strict=True):
        border = 1 if marker is None else max(1, echo.first_after(marker, param))
        before = after = None
        if border > 1:
            before = len(plan.requests)
            plan.requests.append(ScoreRequest(ids[:border], 1, 0.0, top, terms.deadline_s))
        if border < len(ids):
            after = len(plan.requests)
            plan.requests.append(ScoreRequest(ids, border, lam, top, terms.deadline_s))
        scorings.append(Scoring(ids, before, after))
    plan.scorings = scorings


def seed_from_header(value: str | None) -> int | None:
    """X-TC-Ray-Seed, which the stream guard sends with a repeated request. Raises RequestError."""
    if value is None:
        return None
    digits = value.removeprefix("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 19 and -(2**63) <= int(value) < 2**63):
        raise invalid_value("X-TC-Ray-Seed", "must be a whole number of 64 bits")
    return int(value)


def score_after_from_query(value: str | None) -> str | None:
    """`score_after` of the query. Raises RequestError."""
    if value is not None and not 1 <= len(value) <= MAX_STOP_CHARACTERS:
        raise invalid_value("score_after", f"must have 1 to {MAX_STOP_CHARACTERS} characters")
    return value


def lam_from_query(value: str | None) -> float | None:
    """`lambda` of the query. Raises RequestError."""
    if value is None:
        return None
    if not (_NUMBER.fullmatch(value) and 0 <= float(value) <= MAX_LAM):
        raise invalid_value("lambda", f"must be a number from 0 to {MAX_LAM:g}")
    return float(value)


def check_generation(body: GenerationFields) -> None:
    """Raise RequestError for contradictions that do not depend on the model: told before it is looked up."""
    body.requested_lam()
    body.wants_usage()
    body.named_tokens()
