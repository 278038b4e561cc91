"""The response builder: from the engine's events to responses and stream chunks in OpenAI's shapes.

Invariants: of each choice come its echo, its text and its end, in this order; echoes with log-probabilities wait for the
scores of all prompts, and texts wait for the echoes. A chunk has text, or is the first or last of its choice, so that a
repeated generation is cut into the same chunks. The chosen token has one log-probability wherever it stands, also in the
list of the likeliest.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from tc_ray.serving.engine.contract import Event, Finished, Piece, Scored, ScoredToken, Token
from tc_ray.serving.http import answers
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.generate import Generation, Scoring
from tc_ray.serving.http.requests import Resume


class Part(NamedTuple):
    """More of a choice: its text, the tokens that came with it (none where nothing is reported of them), how it ended."""

    choice: int
    text: str
    tokens: Sequence[Token] = ()
    reason: answers.FinishReason | None = None


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
        self._explains = generation.body.explains
        self._pending: list[list[Token]] = [[] for _ in range(generation.n * generation.prompts)]
        """Of each choice, the tokens that came without text."""
        self._new_tokens = 0
        """Generated so far, for all choices."""

    async def response(self, feed: Feed) -> BaseModel:
        """The whole response. Raises RequestError when a generation failed."""
        found: list[list[Part]] = [[] for _ in self._pending]
        async for part in self._parts(feed):
            found[part.choice].append(part)
        choices = []
        for number, parts in enumerate(found):
            tokens = [token for part in parts for token in part.tokens]
            text = "".join(part.text for part in parts)
            choices.append(self._whole(Part(number, text, tokens, parts[-1].reason)))
        return self.response_class(**self.head, choices=choices, usage=self._usage())

    async def chunks(self, feed: Feed) -> AsyncIterator[BaseModel]:
        """The chunks of a stream, each with one choice. Raises RequestError when a generation failed."""
        body = self.generation.body

        def chunk(choice: BaseModel) -> BaseModel:
            return self.chunk_class(**self.head, choices=[choice], usage=self._usage() if body.counts_always else None)

        for opening in self._openings():
            yield chunk(opening)
        async for part in self._parts(feed):
            yield chunk(self._piece(part))
        if body.wants_usage:
            yield self.chunk_class(**self.head, choices=[], usage=self._usage())

    async def _parts(self, feed: Feed) -> AsyncIterator[Part]:
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
        for part in self._echo([scores[place] for place in sorted(scores)]):
            yield part
        for place, event in held:
            for part in self._take(place, event):
                yield part
        async for place, event in events:
            for part in self._take(place, event):
                yield part

    def _echo(self, scores: Sequence[Scored]) -> Iterator[Part]:
        """The prompts before the texts, with their log-probabilities. The first token of a prompt has none."""
        generation = self.generation
        tokens = [
            [Token(request.ids[0]), *(Token(one.id, one.fused, one.top) for one in found.tokens)]
            for request, found in zip(generation.scorings, scores, strict=True)
        ]
        for index in range(len(self._pending) if generation.echoes else 0):
            prompt = index // generation.n
            yield Part(index, generation.echoes[prompt].text, tokens[prompt] if tokens else ())
            if generation.body.max_tokens == 0:
                yield Part(index, "", reason="length")

    def _take(self, place: int, event: Event) -> Iterator[Part]:
        if isinstance(event, Finished):
            yield Part(place, "", self._pending[place], event.finish_reason)
        elif isinstance(event, Piece):
            self._new_tokens += 1
            if self._names_tokens or self._explains:
                self._pending[place] += event.tokens
            if event.text:
                tokens, self._pending[place] = self._pending[place], []
                yield Part(place, event.text, tokens)

    def _usage(self) -> answers.Usage:
        return usage(self.generation.prompt_tokens, self._new_tokens)

    def _reported(self, part: Part) -> dict[str, Any]:
        logprobs = self._logprobs(part.tokens) if self._names_tokens else None
        copilot = self._explained(part.tokens) if self._explains else None
        return {"index": part.choice, "finish_reason": part.reason, "logprobs": logprobs, "copilot": copilot}

    def _explained(self, tokens: Sequence[Token]) -> answers.CopilotAnswer:
        return answers.CopilotAnswer(
            tokens=[
                answers.ExplainedToken(
                    token=self.texts.text(token.id),
                    pilot_token=self.texts.text(token.explained.pilot_id),
                    pilot=token.explained.pilot,
                    fused=token.explained.fused,
                    moved=token.explained.moved,
                )
                for token in tokens
                if token.explained is not None
            ]
        )

    def _openings(self) -> list[answers.ChatChunkChoice]:
        return []

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Token]) -> BaseModel: ...

    @abstractmethod
    def _piece(self, part: Part) -> BaseModel:
        """More of a choice, in a chunk."""

    def _whole(self, part: Part) -> BaseModel:
        return self._piece(part)


class CompletionBuilder(ResponseBuilder):
    """Responses and chunks of /v1/completions, which have one shape."""

    prefix = "cmpl"
    response_class = chunk_class = answers.Completion

    def _piece(self, part: Part) -> BaseModel:
        return answers.CompletionChoice(text=part.text, **self._reported(part))

    def _logprobs(self, tokens: Sequence[Token]) -> BaseModel:
        text = self.texts.text
        return answers.CompletionLogprobs(
            tokens=[text(token.id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                None
                if token.logprob is None
                else {text(id): logprob for id, logprob in (*token.top, (token.id, token.logprob))}
                for token in tokens
            ],
        )


class ChatBuilder(ResponseBuilder):
    """Responses and chunks of /v1/chat/completions."""

    prefix = "chatcmpl"
    response_class, chunk_class = answers.ChatCompletion, answers.ChatChunk

    def _openings(self) -> list[answers.ChatChunkChoice]:
        delta = answers.ChatDelta(role="assistant", content="")
        return [answers.ChatChunkChoice(index=index, delta=delta) for index in range(len(self._pending))]

    def _piece(self, part: Part) -> BaseModel:
        delta = answers.ChatDelta(content=part.text if part.reason is None else None)
        return answers.ChatChunkChoice(delta=delta, **self._reported(part))

    def _whole(self, part: Part) -> BaseModel:
        return answers.ChatChoice(message=answers.ChatAnswer(content=part.text), **self._reported(part))

    def _logprobs(self, tokens: Sequence[Token]) -> BaseModel:
        def fields(id: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self.texts.text(id), "logprob": logprob, "bytes": list(self.texts.utf8(id))}

        content = []
        for token in tokens:
            top = [answers.TokenLogprob(**fields(*one)) for one in token.top]
            content.append(answers.ChatTokenLogprob(**fields(token.id, token.logprob), top_logprobs=top))
        return answers.ChatLogprobs(content=content)


def usage(prompt_tokens: int, completion_tokens: int = 0) -> answers.Usage:
    """Token counts of a request."""
    total = prompt_tokens + completion_tokens
    return answers.Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


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
    text = scoring.served.encoder.texts.text

    def place(token: ScoredToken) -> answers.ScoredPlace:
        top = [answers.ScoredTop(id=id, token=text(id), fused=logprob) for id, logprob in token.top]
        named = None if scoring.body.top_logprobs is None else top
        return answers.ScoredPlace(
            id=token.id, token=text(token.id), pilot=token.pilot, fused=token.fused, top_logprobs=named
        )

    return answers.ScoredCompletion(
        index=index,
        tokens=list(map(place, tokens)),
        token_count=len(tokens),
        pilot=sum(max(token.pilot, answers.LOG_OF_ZERO) for token in tokens),
        fused=sum(max(token.fused, answers.LOG_OF_ZERO) for token in tokens),
    )
