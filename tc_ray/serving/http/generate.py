"""From a body to the engine's requests: prompts as token ids, one request for each choice or scored text.

Invariant: everything that can be refused is refused here or in requests.py, with the field's name, before the engine is
asked. Choices come prompt by prompt; choice i of a prompt draws from seed + i.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine.contract import GenerationRequest, Request, ScoreRequest
from tc_ray.serving.errors import invalid_value
from tc_ray.serving.http.requests import (
    DEFAULT_COMPLETION_TOKENS,
    MIN_TEMPERATURE,
    ChatRequest,
    CompletionRequest,
    ScoreBody,
    split_prompts,
)
from tc_ray.serving.models.registry import ServedModel
from tc_ray.serving.text.prompt import PlacedPrompt, Room

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

    `requests` holds `n` generations for each prompt, unless max_tokens is 0, and then `scorings`, of each prompt, if asked for.
    prompts: their number. echoes: each prompt as text, empty without echo.
    """

    body: CompletionRequest | ChatRequest
    prompts: int
    echoes: Sequence[PlacedPrompt]
    scorings: Sequence[ScoreRequest]

    @property
    def n(self) -> int:
        """Choices of each prompt."""
        return self.body.n or 1


@dataclass(frozen=True)
class Scoring(Work):
    """A /v1/score request: one engine request for each completion."""

    body: ScoreBody


def check_limits(body: Body, limits: ServingSection) -> None:
    """Raise RequestError where a body passes the server's limits."""
    if isinstance(body, ScoreBody):
        if len(split_prompts(body.completion)) > limits.max_choices:
            raise invalid_value("completion", f"this server scores at most {limits.max_choices} per request")
        return
    n = body.n or 1
    choices = n * (len(split_prompts(body.prompt)) if isinstance(body, CompletionRequest) else 1)
    if choices > limits.max_choices:
        raise invalid_value(
            "n" if n > 1 else "prompt",
            f"{choices} choices are asked for, and this server gives at most {limits.max_choices}",
        )
    if body.max_tokens is not None and body.max_tokens > limits.max_tokens:
        raise invalid_value("max_tokens", f"this server generates at most {limits.max_tokens} tokens per choice")


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
    _check_tokens(body, served.encoder.vocab_size)
    asked, engine = body.max_tokens, served.engine
    room = _room(served, limits, 1 if asked is None else asked)
    echoes: list[PlacedPrompt] = []
    scorings: list[ScoreRequest] = []
    if isinstance(body, CompletionRequest):
        given, default = split_prompts(body.prompt), DEFAULT_COMPLETION_TOKENS
        if body.scores_prompt and engine.encoder_decoder:
            reason = "with `logprobs` it scores the prompt, which an encoder-decoder does not; score texts by /v1/score"
            raise invalid_value("echo", reason)
        prompts = [served.encoder.ids(one, room) for one in given]
        if body.echo:
            echoes = [served.encoder.placed(one, ids) for one, ids in zip(given, prompts, strict=True)]
        for ids, echo in zip(prompts, echoes, strict=True) if body.scores_prompt else ():
            start = 1 if body.score_after is None else max(1, echo.first_after(body.score_after, "copilot.score_after"))
            scorings.append(ScoreRequest(ids, start, body.weight, body.named_tokens or 0, deadline_s, before=True))
    else:
        messages = [{"role": message.turn, "content": message.text()} for message in body.messages]
        continues = bool(body.continue_final_message)
        opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt
        variables = body.chat_template_kwargs
        prompts = [served.encoder.chat(messages, room, opens=opens, continues=continues, variables=variables)]
        default = limits.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    generations = [
        GenerationRequest(
            prompt_ids=ids,
            max_new_tokens=min(asked or default, limits.max_tokens, engine.room_after(len(ids))),
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k if body.top_k is not None and body.top_k > 0 else None,
            seed=seed + i,
            stops=body.stops,
            bias=tuple((int(token), more) for token, more in (body.logit_bias or {}).items()),
            repetition_penalty=body.repetition_penalty or 1.0,
            end_ids=frozenset(body.stop_token_ids or ()),
            min_new_tokens=body.min_tokens or 0,
            ignore_end=bool(body.ignore_eos),
            lam=body.weight,
            logprobs=body.named_tokens,
            explain=body.explains,
            owner=owner,
            deadline_s=deadline_s,
        )
        for ids in (prompts if asked != 0 else ())
        for i in range(body.n or 1)
    ]
    requests: list[Request] = [*generations, *scorings]
    return Generation(served, requests, sum(map(len, prompts)), body, len(prompts), echoes, scorings)


def make_scoring(
    served: ServedModel, deadline_s: float, *, body: ScoreBody, limits: ServingSection, owner: bytes
) -> Scoring:
    """Encode a /v1/score body that is within the limits. Raises RequestError.

    What is scored is the prompt's ids followed by the completion's, each tokenised by itself as in training. The Copilot
    begins with the completion's first token.
    """
    prompt = served.encoder.ids(body.prompt, _room(served, limits, 1))
    ending = (served.encoder.end,) if body.end_token else ()
    room, named = Room(served.engine.room_after(len(prompt)) - len(ending)), body.top_logprobs or 0
    requests = []
    for number, given in enumerate(split_prompts(body.completion)):
        name = f"completion[{number}]" if given is not body.completion else "completion"
        ids = served.encoder.ids(given, room, name, special=False)
        text = (*prompt, *ids, *ending)
        requests.append(ScoreRequest(text, len(prompt), body.weight, named, deadline_s, owner=owner))
    return Scoring(served, requests, len(prompt), body)


def _room(served: ServedModel, limits: ServingSection, asked: int) -> Room:
    """For a prompt that leaves room for a token if any are asked for, or of what the server allows."""
    context, apart = served.engine.context_tokens, served.engine.encoder_decoder
    tokens = context - bool(asked and not apart)
    if limits.max_prompt_tokens is not None and limits.max_prompt_tokens < tokens:
        return Room(limits.max_prompt_tokens)
    return Room(tokens, context, 0 if apart else asked)


def _check_tokens(body: CompletionRequest | ChatRequest, vocab_size: int) -> None:
    """Raise RequestError for token ids that the model does not have."""
    for name, ids in (("logit_bias", map(int, body.logit_bias or ())), ("stop_token_ids", body.stop_token_ids or ())):
        if any(token >= vocab_size for token in ids):
            raise invalid_value(name, f"token ids must be below {vocab_size}")
