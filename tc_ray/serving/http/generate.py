"""From a body to the engine's requests: prompts as token ids, one request for each choice or scored text.

Invariant: everything that can be refused is refused here or in requests.py, with the field's name, before the engine is
asked. Choices come prompt by prompt; choice i of a prompt draws from seed + i. Used by the routes; encoding runs in a
worker thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tc_ray.config.serving import ServingSection
from tc_ray.serving.engine import GenerationRequest, Request, Scored, ScoreRequest, Token
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


@dataclass
class EchoScores:
    """Scores of one echoed prompt: the Pilot's of ids[1:border], the fused model's of ids[border:].

    before, after: indices of the two engine requests in `Generation.requests`; None where there is nothing to score.
    """

    ids: tuple[int, ...]
    before: int | None
    after: int | None
    found: dict[int, Scored] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every engine request of the prompt has its scores."""
        return all(place is None or place in self.found for place in (self.before, self.after))

    def tokens(self) -> list[Token]:
        """All tokens of the prompt. The first one has no log-probability."""
        tokens = [Token(self.ids[0])]
        for place in (self.before, self.after):
            if place is not None:
                tokens += [Token(one.id, one.fused, one.top) for one in self.found[place].tokens]
        return tokens


@dataclass
class Generation:
    """What one completion or chat request asks of one engine.

    requests: first `n` generations for each prompt, then the scorings of echoed prompts. prompts: their number.
    prompt_tokens: of all prompts together. named_tokens, explain: what to report of each token.
    echoes: each prompt as text, empty without echo. echo_scores: of each prompt, empty without log-probabilities.
    """

    served: ServedModel
    requests: list[Request]
    n: int
    prompts: int
    seed: int
    prompt_tokens: int
    named_tokens: int | None
    explain: bool
    echoes: Sequence[PlacedPrompt] = ()
    echo_scores: Sequence[EchoScores] = ()

    @property
    def choices(self) -> int:
        """Choices of the response."""
        return self.n * self.prompts

    @property
    def generates(self) -> bool:
        """Whether there are new tokens at all; `max_tokens` 0 only echoes."""
        return any(isinstance(one, GenerationRequest) for one in self.requests)

    def scores_of(self, place: int) -> tuple[int, EchoScores]:
        """The prompt that engine request `place` scores, and its scores."""
        return next((p, one) for p, one in enumerate(self.echo_scores) if place in (one.before, one.after))


@dataclass(frozen=True)
class Scoring:
    """What one /v1/score request asks of one engine: one engine request for each completion."""

    served: ServedModel
    requests: list[ScoreRequest]
    prompt_tokens: int
    lam: float
    named_tokens: int | None


def places_of(body: CompletionRequest | ChatRequest | ScoreBody, limits: ServingSection) -> int:
    """Places that a body needs in the engine, at most. Raises RequestError where it passes the server's limits."""
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
    scorings = 2 * prompts if isinstance(body, CompletionRequest) and body.scores_prompt else 0
    return (0 if new_tokens == 0 else n * prompts) + scorings


def make_generation(
    served: ServedModel, body: CompletionRequest | ChatRequest, limits: ServingSection, seed: int, deadline_s: float
) -> Generation:
    """Encode the prompts of a body that is within the limits. Raises RequestError."""
    n, (name, asked) = body.n or 1, body.token_limit
    context = served.engine.context_tokens
    free = context - (1 if asked is None else asked)
    longest = min(free, limits.max_prompt_tokens or free)
    if longest < 1:
        raise RequestError(
            f"Field `{name}`: the model has {context} positions for prompt and new tokens.",
            param=name,
            code="context_length_exceeded",
        )
    if isinstance(body, CompletionRequest):
        prompts = [served.encoder.prompt(one, longest) for one in split_prompts(body.prompt)]
    else:
        messages = [{"role": message.role, "content": message.text()} for message in body.messages]
        prompts = [served.encoder.chat(messages, longest)]
    default = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else limits.max_tokens
    requests: list[Request] = []
    for ids in prompts if asked != 0 else ():
        new = asked or min(default, limits.max_tokens, context - len(ids))
        requests += [_generation_request(body, ids, new, seed + i, deadline_s) for i in range(n)]
    tokens = sum(map(len, prompts))
    generation = Generation(served, requests, n, len(prompts), seed, tokens, body.named_tokens, body.explains)
    if isinstance(body, CompletionRequest) and body.echo:
        given = split_prompts(body.prompt)
        generation.echoes = [served.encoder.placed(one, ids) for one, ids in zip(given, prompts, strict=True)]
        if body.scores_prompt:
            pairs = zip(prompts, generation.echoes, strict=True)
            generation.echo_scores = [_score_echo(requests, body, ids, echo, deadline_s) for ids, echo in pairs]
    return generation


def _generation_request(
    body: CompletionRequest | ChatRequest, ids: tuple[int, ...], new: int, seed: int, deadline_s: float
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=ids,
        max_new_tokens=new,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k,
        seed=seed,
        stops=body.stops,
        lam=body.weight,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logprobs=body.named_tokens,
        explain=body.explains,
        deadline_s=deadline_s,
    )


def _score_echo(
    requests: list[Request], body: CompletionRequest, ids: tuple[int, ...], echo: PlacedPrompt, deadline_s: float
) -> EchoScores:
    """Add the requests that score an echoed prompt. The Copilot begins at `border`; before it the Pilot scores alone."""
    border = 1 if body.score_after is None else max(1, echo.first_after(body.score_after, "copilot.score_after"))
    top = body.named_tokens or 0
    before = after = None
    if border > 1:
        before = len(requests)
        requests.append(ScoreRequest(ids[:border], 1, 0.0, top, deadline_s))
    if border < len(ids):
        after = len(requests)
        requests.append(ScoreRequest(ids, border, body.weight, top, deadline_s))
    return EchoScores(ids, before, after)


def make_scoring(served: ServedModel, body: ScoreBody, limits: ServingSection, deadline_s: float) -> Scoring:
    """Encode a /v1/score body that is within the limits. Raises RequestError.

    What is scored is the prompt's ids followed by the completion's, each tokenised by itself as in training. The Copilot
    begins with the completion's first token.
    """
    context = served.engine.context_tokens
    if context < 2:
        raise RequestError(
            "Field `model`: it has no position for a prompt.", param="model", code="context_length_exceeded"
        )
    prompt = served.encoder.prompt(body.prompt, min(context - 1, limits.max_prompt_tokens or context))
    requests = []
    for number, given in enumerate(split_prompts(body.completion)):
        name = f"completion[{number}]" if given is not body.completion else "completion"
        ids = served.encoder.completion(given, context - len(prompt), name)
        requests.append(ScoreRequest((*prompt, *ids), len(prompt), body.weight, body.top_logprobs or 0, deadline_s))
    lam = served.default_lam if body.weight is None else body.weight
    return Scoring(served, requests, len(prompt), lam, body.top_logprobs)
