"""POST /v1/score: log-probabilities of given completions under Pilot and fused model.

Invariant: what is scored is the prompt's ids followed by the completion's, each tokenised by itself as in training, and the
Copilot begins with the completion's first token. Used by routes.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine import Scored, ScoredToken, ScoreRequest
from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.http.answers import (
    PromptTokensDetails,
    ScoreAnswer,
    ScoredCompletion,
    ScoredPlace,
    ScoredTop,
    Usage,
    finite,
)
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.requests import ScoreBody, split_prompts
from tc_ray.serving.models.registry import ServedModel
from tc_ray.serving.text.token_texts import TokenTexts


@dataclass(frozen=True)
class ScorePlan:
    """What one body asks: one engine request a completion."""

    served: ServedModel
    requests: tuple[ScoreRequest, ...]
    prompt_tokens: int
    lam: float


def make_score_plan(served: ServedModel, body: ScoreBody, limits: ServingSection, deadline_s: float) -> ScorePlan:
    """Check a body and encode it. Raises RequestError."""
    completions = split_prompts(body.completion)
    if len(completions) > limits.max_choices:
        raise invalid_value("completion", f"this server scores at most {limits.max_choices} a request")
    room = served.engine.context_tokens
    if room < 2:
        raise RequestError("Field `model`: it has no room for a prompt.", param="model", code="context_length_exceeded")
    prompt = served.encoder.prompt(body.prompt, min(room - 1, limits.max_prompt_tokens or room))
    lam = body.requested_lam()
    requests = []
    for number, given in enumerate(completions):
        field = f"completion[{number}]" if given is not body.completion else "completion"
        ids = served.encoder.completion(given, room - len(prompt), field)
        requests.append(ScoreRequest((*prompt, *ids), len(prompt), lam, body.top_logprobs or 0, deadline_s))
    return ScorePlan(served, tuple(requests), len(prompt), served.default_lam if lam is None else lam)


async def score_answer(plan: ScorePlan, body: ScoreBody, feed: Feed) -> ScoreAnswer:
    """Wait for the scores. Raises RequestError when one failed."""
    found: dict[int, Scored] = {}
    async for place, event in feed.events():
        assert isinstance(event, Scored)
        found[place] = event
    texts = plan.served.encoder.texts
    tops = body.top_logprobs is not None
    completions = [_completion(index, found[index].tokens, texts, tops) for index in range(len(plan.requests))]
    scored_tokens = sum(one.token_count for one in completions)
    return ScoreAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=plan.served.name,
        lam=plan.lam,
        completions=completions,
        usage=Usage(
            prompt_tokens=plan.prompt_tokens + scored_tokens,
            completion_tokens=0,
            total_tokens=plan.prompt_tokens + scored_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        ),
    )


def _completion(index: int, tokens: Sequence[ScoredToken], texts: TokenTexts, tops: bool) -> ScoredCompletion:
    return ScoredCompletion(
        index=index,
        tokens=[_place(token, texts, tops) for token in tokens],
        token_count=len(tokens),
        pilot=finite(sum(token.pilot for token in tokens)),
        fused=finite(sum(token.fused for token in tokens)),
    )


def _place(token: ScoredToken, texts: TokenTexts, tops: bool) -> ScoredPlace:
    top = [
        ScoredTop(id=id, token=texts.text(id), fused=finite(token.fused if id == token.id else logprob))
        for id, logprob in token.top
    ]
    return ScoredPlace(
        id=token.id,
        token=texts.text(token.id),
        pilot=finite(token.pilot),
        fused=finite(token.fused),
        top_logprobs=top if tops else None,
    )
