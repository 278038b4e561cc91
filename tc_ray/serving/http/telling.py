"""Tokens of the engine as the API tells them: log-probabilities in both of OpenAI's forms, and explanations.

Invariant: the chosen token's own log-probability is the one number told for it, also in the list of the likeliest, so
that a client may compare them. Used by shapes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tc_ray.serving.engine import Token
from tc_ray.serving.http.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    CopilotAnswer,
    ExplainedToken,
    TokenLogprob,
    finite,
)
from tc_ray.serving.text.token_texts import TokenTexts


@dataclass(frozen=True)
class PlacedToken:
    """A token and where it begins in the choice's text, in characters."""

    token: Token
    offset: int


def completion_logprobs(tokens: Sequence[PlacedToken], texts: TokenTexts) -> CompletionLogprobs:
    """As /v1/completions tells them."""
    tops: list[dict[str, float] | None] = []
    for placed in tokens:
        token = placed.token
        if token.logprob is None:
            tops.append(None)
            continue
        top = {texts.text(id): finite(logprob) for id, logprob in token.top}
        top[texts.text(token.id)] = finite(token.logprob)
        tops.append(top)
    return CompletionLogprobs(
        tokens=[texts.text(placed.token.id) for placed in tokens],
        token_logprobs=[None if p.token.logprob is None else finite(p.token.logprob) for p in tokens],
        top_logprobs=tops,
        text_offset=[placed.offset for placed in tokens],
    )


def chat_logprobs(tokens: Sequence[PlacedToken], texts: TokenTexts) -> ChatLogprobs:
    """As /v1/chat/completions tells them."""
    return ChatLogprobs(content=[_chat_token(placed.token, texts) for placed in tokens])


def _chat_token(token: Token, texts: TokenTexts) -> ChatTokenLogprob:
    said = -float("inf") if token.logprob is None else token.logprob
    top = [_one(id, said if id == token.id else logprob, texts) for id, logprob in token.top]
    own = _one(token.id, said, texts)
    return ChatTokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def _one(token: int, logprob: float, texts: TokenTexts) -> TokenLogprob:
    return TokenLogprob(token=texts.text(token), logprob=finite(logprob), bytes=list(texts.utf8(token)))


def explained(tokens: Sequence[PlacedToken], texts: TokenTexts) -> CopilotAnswer:
    """What the Copilot did at each token that was generated."""
    told = [(placed.token.id, placed.token.explained) for placed in tokens]
    return CopilotAnswer(
        tokens=[
            ExplainedToken(
                token=texts.text(id),
                pilot_token=texts.text(one.pilot_id),
                pilot=one.pilot,
                fused=one.fused,
                moved=one.moved,
            )
            for id, one in told
            if one is not None
        ]
    )
