"""The response builder: from the engine's events to responses and stream chunks in OpenAI's shapes.

Invariants: of each choice come its echo, its text and its end, in this order; echoes with log-probabilities wait for the
scores of all prompts, and texts wait for the echoes. A chunk has text, or is the first or last of its choice, so that a
repeated generation is cut into the same chunks. The chosen token has one log-probability wherever it stands, also in the
list of the likeliest. Used by the routes, one builder per request.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tc_ray.serving.engine.contract import Event, Finished, Piece, Scored, ScoredToken, Token
from tc_ray.serving.http import answers
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.generate import Generation, Scoring
from tc_ray.serving.http.requests import Resume
from tc_ray.serving.text.token_texts import TokenTexts

Step = tuple[int, "Part", answers.FinishReason | None]
"""Index of a choice, more of it, and how it ended; None: it goes on."""


@dataclass(frozen=True)
class Part:
    """More text of a choice and the tokens that came with it.

    tokens: empty where nothing is reported of them. offsets: where they begin in the choice's text, in characters.
    """

    text: str
    tokens: Sequence[Token] = ()
    offsets: Sequence[int] = ()

    @staticmethod
    def joined(parts: Sequence[Part]) -> Part:
        """Successive parts as one."""
        tokens = [token for part in parts for token in part.tokens]
        return Part("".join(part.text for part in parts), tokens, [at for part in parts for at in part.offsets])


class ChoiceText:
    """The growing text of one choice. reports_tokens: the response has log-probabilities or explanations."""

    def __init__(self, texts: TokenTexts, reports_tokens: bool) -> None:
        self._texts, self._reports_tokens = texts, reports_tokens
        self._length = 0
        self._pending: list[Token] = []

    def echo(self, text: str, begins: Sequence[int], tokens: Sequence[Token]) -> Part:
        """The prompt, before any new text. begins: where each token begins. tokens: empty without log-probabilities."""
        self._length = len(text)
        return Part(text, tokens, begins if tokens else ())

    def piece(self, piece: Piece) -> Part | None:
        """The next part; None while there is no new text."""
        if self._reports_tokens:
            self._pending += piece.tokens
        return self._part(piece.text) if piece.text else None

    def rest(self) -> Part:
        """Tokens without text at the end: the end token, those of a stop string."""
        return self._part("")

    def _part(self, text: str) -> Part:
        begin, at, offsets = self._length, 0, []
        for token in self._pending:
            own = self._texts.text(token.id)
            # A part of a character or of a stop string, and a special token, are not found: the place stays.
            found = text.find(own, at) if own else -1
            at = max(at, found)
            offsets.append(begin + at)
            at += len(own) if found >= 0 else 0
        tokens, self._length, self._pending = self._pending, begin + len(text), []
        return Part(text, tokens, offsets)


class ResponseBuilder(ABC):
    """Builds the response of one request, or the chunks of its stream.

    resume: id and time of a stream that is repeated because its replica ended; None: new ones.
    """

    prefix: str
    response_class: type[answers.Completion | answers.ChatCompletion]
    chunk_class: type[answers.Completion | answers.ChatChunk]

    def __init__(self, generation: Generation, resume: Resume | None = None) -> None:
        self.generation = generation
        self.texts = generation.served.encoder.texts
        identity = resume or Resume(id=f"{self.prefix}-{uuid.uuid4().hex}", created=int(time.time()))
        self.head: dict[str, Any] = {**identity.model_dump(), "model": generation.served.name}
        self._names_tokens = generation.body.named_tokens is not None
        reports_tokens = self._names_tokens or generation.body.explains
        choices = generation.n * generation.prompts
        self._choices = [ChoiceText(self.texts, reports_tokens) for _ in range(choices)]
        self._ended: dict[int, Finished] = {}

    async def response(self, feed: Feed) -> BaseModel:
        """The whole response. Raises RequestError when a generation failed."""
        parts: list[list[Part]] = [[] for _ in self._choices]
        async for index, part, _ in self._parts(feed):
            parts[index].append(part)
        # Without new tokens (`max_tokens` 0) a choice ends by its length.
        reasons = [self._ended[i].finish_reason if i in self._ended else "length" for i in range(len(parts))]
        choices = [self._whole(i, Part.joined(parts[i]), reason) for i, reason in enumerate(reasons)]
        return self.response_class(**self.head, choices=choices, usage=self._usage())

    async def chunks(self, feed: Feed, with_usage: bool) -> AsyncIterator[BaseModel]:
        """The chunks of a stream, each with one choice. Raises RequestError when a generation failed."""
        for index in range(len(self._choices)):
            if (opening := self._opening(index)) is not None:
                yield self.chunk_class(**self.head, choices=[opening])
        async for index, part, reason in self._parts(feed):
            yield self.chunk_class(**self.head, choices=[self._piece(index, part, reason)])
        if with_usage:
            yield self.chunk_class(**self.head, choices=[], usage=self._usage())

    async def _parts(self, feed: Feed) -> AsyncIterator[Step]:
        """The parts of all choices, in the order in which a client reads them."""
        scores: dict[int, Scored] = {}
        held: list[tuple[int, Event]] = []
        events = feed.events()
        while len(scores) < len(self.generation.scorings):
            place, event = await anext(events)
            if isinstance(event, Scored):
                scores[place] = event
            else:
                held.append((place, event))
        for step in self._echo([scores[place] for place in sorted(scores)]):
            yield step
        for place, event in held:
            for step in self._take(place, event):
                yield step
        async for place, event in events:
            for step in self._take(place, event):
                yield step

    def _echo(self, scores: Sequence[Scored]) -> Iterator[Step]:
        """The prompts before the texts, with their log-probabilities. The first token of a prompt has none."""
        generation = self.generation
        tokens = [
            [Token(request.ids[0]), *(Token(one.id, one.fused, one.top) for one in found.tokens)]
            for request, found in zip(generation.scorings, scores, strict=True)
        ]
        for index, choice in enumerate(self._choices if generation.echoes else ()):
            prompt = index // generation.n
            echo = generation.echoes[prompt]
            yield index, choice.echo(echo.text, echo.begins, tokens[prompt] if tokens else ()), None
            if generation.body.token_limit[1] == 0:
                yield index, Part(""), "length"

    def _take(self, place: int, event: Event) -> Iterator[Step]:
        if isinstance(event, Finished):
            self._ended[place] = event
            yield place, self._choices[place].rest(), event.finish_reason
        elif isinstance(event, Piece) and (part := self._choices[place].piece(event)) is not None:
            yield place, part, None

    def _usage(self) -> answers.Usage:
        """Token counts of the request. Cached tokens of a prompt are those that none of its choices computed."""
        n, prompts = self.generation.n, range(self.generation.prompts)
        of_prompts = [
            [self._ended[i].cached_tokens for i in range(p * n, p * n + n) if i in self._ended] for p in prompts
        ]
        return usage(
            self.generation.prompt_tokens,
            sum(end.completion_tokens for end in self._ended.values()),
            sum(min(of_prompt, default=0) for of_prompt in of_prompts),
        )

    def _explained(self, part: Part) -> answers.CopilotAnswer | None:
        return explained(part.tokens, self.texts) if self.generation.body.explains else None

    def _opening(self, index: int) -> Any | None:
        """The choice of the chunk before its first text, if the shape has one."""
        return None

    @abstractmethod
    def _piece(self, index: int, part: Part, reason: answers.FinishReason | None) -> Any:
        """More of a choice, in a chunk."""

    def _whole(self, index: int, part: Part, reason: answers.FinishReason) -> Any:
        """A choice of the whole response."""
        return self._piece(index, part, reason)


class CompletionBuilder(ResponseBuilder):
    """Responses and chunks of /v1/completions, which have one shape."""

    prefix = "cmpl"
    response_class = chunk_class = answers.Completion

    def _piece(self, index: int, part: Part, reason: answers.FinishReason | None) -> Any:
        logprobs = completion_logprobs(part, self.texts) if self._names_tokens else None
        copilot = self._explained(part)
        return answers.CompletionChoice(
            index=index, text=part.text, logprobs=logprobs, copilot=copilot, finish_reason=reason
        )


class ChatBuilder(ResponseBuilder):
    """Responses and chunks of /v1/chat/completions."""

    prefix = "chatcmpl"
    response_class, chunk_class = answers.ChatCompletion, answers.ChatChunk

    def _opening(self, index: int) -> Any | None:
        return answers.ChatChunkChoice(index=index, delta=answers.ChatDelta(role="assistant", content=""))

    def _piece(self, index: int, part: Part, reason: answers.FinishReason | None) -> Any:
        delta = answers.ChatDelta(content=part.text if reason is None else None)
        return answers.ChatChunkChoice(index=index, delta=delta, finish_reason=reason, **self._reported(part))

    def _whole(self, index: int, part: Part, reason: answers.FinishReason) -> Any:
        message = answers.ChatAnswer(content=part.text)
        return answers.ChatChoice(index=index, message=message, finish_reason=reason, **self._reported(part))

    def _reported(self, part: Part) -> dict[str, Any]:
        logprobs = chat_logprobs(part.tokens, self.texts) if self._names_tokens else None
        return {"logprobs": logprobs, "copilot": self._explained(part)}


def usage(prompt_tokens: int, completion_tokens: int = 0, cached_tokens: int = 0) -> answers.Usage:
    """Token counts of a request."""
    return answers.Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=answers.PromptTokensDetails(cached_tokens=cached_tokens),
    )


def completion_logprobs(part: Part, texts: TokenTexts) -> answers.CompletionLogprobs:
    """Log-probabilities as /v1/completions reports them."""
    return answers.CompletionLogprobs(
        tokens=[texts.text(token.id) for token in part.tokens],
        token_logprobs=[token.logprob for token in part.tokens],
        top_logprobs=[
            None
            if token.logprob is None
            else {texts.text(id): logprob for id, logprob in (*token.top, (token.id, token.logprob))}
            for token in part.tokens
        ],
        text_offset=list(part.offsets),
    )


def chat_logprobs(tokens: Sequence[Token], texts: TokenTexts) -> answers.ChatLogprobs:
    """Log-probabilities as /v1/chat/completions reports them."""

    def fields(id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": texts.text(id), "logprob": logprob, "bytes": list(texts.utf8(id))}

    content = []
    for token in tokens:
        top = [answers.TokenLogprob(**fields(*one)) for one in token.top]
        content.append(answers.ChatTokenLogprob(**fields(token.id, token.logprob), top_logprobs=top))
    return answers.ChatLogprobs(content=content)


def explained(tokens: Sequence[Token], texts: TokenTexts) -> answers.CopilotAnswer:
    """What the Copilot did at each generated token."""
    return answers.CopilotAnswer(
        tokens=[
            answers.ExplainedToken(
                token=texts.text(token.id),
                pilot_token=texts.text(token.explained.pilot_id),
                pilot=token.explained.pilot,
                fused=token.explained.fused,
                moved=token.explained.moved,
            )
            for token in tokens
            if token.explained is not None
        ]
    )


async def score_response(scoring: Scoring, feed: Feed) -> answers.ScoreAnswer:
    """The response of /v1/score. Raises RequestError when a scoring failed."""
    found: dict[int, Scored] = {}
    async for place, event in feed.events():
        assert isinstance(event, Scored)
        found[place] = event
    completions = [_scored_completion(index, found[index].tokens, scoring) for index in range(len(scoring.requests))]
    return answers.ScoreAnswer(
        id=f"score-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=scoring.served.name,
        lam=scoring.served.default_lam if scoring.body.weight is None else scoring.body.weight,
        completions=completions,
        usage=usage(scoring.prompt_tokens + sum(one.token_count for one in completions)),
    )


def _scored_completion(index: int, tokens: Sequence[ScoredToken], scoring: Scoring) -> answers.ScoredCompletion:
    texts = scoring.served.encoder.texts

    def place(token: ScoredToken) -> answers.ScoredPlace:
        top = [answers.ScoredTop(id=id, token=texts.text(id), fused=logprob) for id, logprob in token.top]
        named = None if scoring.body.top_logprobs is None else top
        text = texts.text(token.id)
        return answers.ScoredPlace(id=token.id, token=text, pilot=token.pilot, fused=token.fused, top_logprobs=named)

    return answers.ScoredCompletion(
        index=index,
        tokens=[place(token) for token in tokens],
        token_count=len(tokens),
        pilot=sum(token.pilot for token in tokens),
        fused=sum(token.fused for token in tokens),
    )
