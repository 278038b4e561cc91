"""From a body to the engine's requests: prompts as token ids, one request for each choice or scored text.

Invariant: everything that can be refused is refused here or in requests.py, with the field's name, before the engine is
asked. Choices come prompt by prompt; choice i of a prompt draws from seed + i. Used by the routes; encoding runs in a
worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine.contract import GenerationRequest, Request, ScoreRequest
from tc_ray.serving.errors import RequestError, invalid_value
from tc_ray.serving.http.requests import (
    DEFAULT_COMPLETION_TOKENS,
    ChatRequest,
    CompletionRequest,
    ScoreBody,
    split_prompts,
)
from tc_ray.serving.models.registry import ServedModel
from tc_ray.serving.text.prompt import PlacedPrompt

Body = CompletionRequest | ChatRequest | ScoreBody


@dataclass(frozen=True)
class Work:
    """What one request asks of one engine. prompt_tokens: of all prompts together."""

    served: ServedModel
    requests: Sequence[Request]
    prompt_tokens: int


@dataclass(frozen=True)
class Generation(Work):
    """A completion or chat request.

    `requests` holds `n` generations for each prompt, unless max_tokens is 0, and then a scoring of each prompt, if asked for.
    prompts: their number. echoes: each prompt as text, empty without echo.
    """

    body: CompletionRequest | ChatRequest
    prompts: int
    echoes: Sequence[PlacedPrompt]

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.body.n or 1

    @property
    def scorings(self) -> Sequence[ScoreRequest]:
        """The last requests: one for each prompt, or none."""
        return [one for one in self.requests if isinstance(one, ScoreRequest)]


@dataclass(frozen=True)
class Scoring(Work):
    """A /v1/score request: one engine request for each completion."""

    body: ScoreBody


def places_of(body: Body, limits: ServingSection) -> int:
    """Places that a body needs in the engine. Raises RequestError where it passes the server's limits."""
    if isinstance(body, ScoreBody):
        completions = len(split_prompts(body.completion))
        if completions > limits.max_choices:
            raise invalid_value("completion", f"this server scores at most {limits.max_choices} per request")
        return completions
    n = body.n or 1
    prompts = len(split_prompts(body.prompt)) if isinstance(body, CompletionRequest) else 1
    if n * prompts > limits.max_choices:
        raise invalid_value(
            "n" if n > 1 else "prompt",
            f"{n * prompts} choices are asked for, and this server gives at most {limits.max_choices}",
        )
    name, new_tokens = body.token_limit
    if new_tokens is not None and new_tokens > limits.max_tokens:
        raise invalid_value(name, f"this server generates at most {limits.max_tokens} tokens per choice")
    scorings = prompts if isinstance(body, CompletionRequest) and body.scores_prompt else 0
    return (0 if new_tokens == 0 else n * prompts) + scorings


def make_generation(
    served: ServedModel,
    deadline_s: float,
    *,
    body: CompletionRequest | ChatRequest,
    limits: ServingSection,
    seed: int,
    owner: bytes,
) -> Generation:
    """Encode the prompts of a body that is within the limits. Raises RequestError.

    seed: of the first choice. owner: the client's key. deadline_s: `time.monotonic()` at which the request fails.
    """
    name, asked = body.token_limit
    context = served.engine.context_tokens
    free = context - (1 if asked is None else asked)
    longest = min(free, limits.max_prompt_tokens or free)
    if longest < 1:
        raise _no_position(name, f"the model has {context} positions for prompt and new tokens")
    requests: list[Request] = []
    echoes: list[PlacedPrompt] = []
    if isinstance(body, CompletionRequest):
        given, default = split_prompts(body.prompt), DEFAULT_COMPLETION_TOKENS
        prompts = [served.encoder.ids(one, longest) for one in given]
        if body.echo:
            echoes = [served.encoder.placed(one, ids) for one, ids in zip(given, prompts, strict=True)]
    else:
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        prompts, default = [served.encoder.chat(messages, longest)], limits.max_tokens
    for ids in prompts if asked != 0 else ():
        new = asked or min(default, limits.max_tokens, context - len(ids))
        requests += [
            GenerationRequest(
                prompt_ids=ids,
                max_new_tokens=new,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=body.top_k,
                seed=seed + i,
                stops=body.stops,
                lam=body.weight,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logprobs=body.named_tokens,
                explain=body.explains,
                owner=owner,
                deadline_s=deadline_s,
            )
            for i in range(body.n or 1)
        ]
    if isinstance(body, CompletionRequest) and body.scores_prompt:
        for ids, echo in zip(prompts, echoes, strict=True):
            marker = body.score_after
            start = 1 if marker is None else max(1, echo.first_after(marker, "copilot.score_after"))
            requests.append(ScoreRequest(ids, start, body.weight, body.named_tokens or 0, deadline_s, before=True))
    return Generation(served, requests, sum(map(len, prompts)), body, len(prompts), echoes)


def make_scoring(served: ServedModel, deadline_s: float, *, body: ScoreBody, limits: ServingSection) -> Scoring:
    """Encode a /v1/score body that is within the limits. Raises RequestError.

    What is scored is the prompt's ids followed by the completion's, each tokenised by itself as in training. The Copilot
    begins with the completion's first token.
    """
    context = served.engine.context_tokens
    if context < 2:
        raise _no_position("model", "it has no position for a prompt")
    prompt = served.encoder.ids(body.prompt, min(context - 1, limits.max_prompt_tokens or context))
    requests = []
    for number, given in enumerate(split_prompts(body.completion)):
        name = f"completion[{number}]" if given is not body.completion else "completion"
        ids = served.encoder.ids(given, context - len(prompt), name, special=False)
        requests.append(ScoreRequest((*prompt, *ids), len(prompt), body.weight, body.top_logprobs or 0, deadline_s))
    return Scoring(served, requests, len(prompt), body)


def _no_position(param: str, reason: str) -> RequestError:
    return RequestError(f"Field `{param}`: {reason}.", param=param, code="context_length_exceeded")
