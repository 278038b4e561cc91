"""From the engine's events to answers and chunks, in the shapes of both routes.

Invariant: a chunk has text, or is the first or last of its choice: pieces without text wait for the next that has some, so
that a repeated generation is cut into the same chunks. An answer without a stream is made of the same parts.
Used by the routes and streams, once a request.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel

from tc_ray.serving.engine import Finished, Piece, Token
from tc_ray.serving.http.answers import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CopilotAnswer,
    FinishReason,
    PromptTokensDetails,
    Usage,
)
from tc_ray.serving.http.generate import Plan
from tc_ray.serving.http.telling import PlacedToken, chat_logprobs, completion_logprobs, explained
from tc_ray.serving.text.token_texts import TokenTexts


@dataclass(frozen=True)
class Part:
    """Some of a choice: text and the tokens that came with it. tokens: empty where nothing is told of them."""

    text: str
    tokens: tuple[PlacedToken, ...] = ()

    @staticmethod
    def joined(parts: Sequence[Part]) -> Part:
        """Parts that follow each other as one."""
        return Part("".join(part.text for part in parts), tuple(token for part in parts for token in part.tokens))


class ChoiceText:
    """The text of one choice as it grows. `tells`: the answer says something of each token."""

    def __init__(self, texts: TokenTexts, tells: bool) -> None:
        self._texts, self._tells = texts, tells
        self._length = 0
        self._pending: list[Token] = []

    def echo(self, text: str, begins: Sequence[int], tokens: Sequence[Token]) -> Part:
        """The prompt, before anything else. tokens: empty where nothing is told of them."""
        self._length = len(text)
        return Part(text, tuple(PlacedToken(token, at) for token, at in zip(tokens, begins, strict=False)))

    def piece(self, piece: Piece) -> Part | None:
        """What there is to tell, None while no text has come."""
        if self._tells:
            self._pending += piece.tokens
        return self._part(piece.text) if piece.text else None

    def rest(self) -> Part:
        """Tokens without text at the end: the end token, a stop string."""
        return self._part("")

    def _part(self, text: str) -> Part:
        begin, at, placed = self._length, 0, []
        for token in self._pending:
            own = self._texts.text(token.id)
            # Not found: part of a character, of a stop string, or a special token. It gets the place it came at.
            found = text.find(own, at) if own else -1
            at = max(at, found)
            placed.append(PlacedToken(token, begin + at))
            at += len(own) if found >= 0 else 0
        self._length, self._pending = begin + len(text), []
        return Part(text, tuple(placed))


@dataclass
class Ends:
    """How the choices of a request ended: event by index of the choice."""

    plan: Plan
    found: dict[int, Finished] = field(default_factory=dict)

    def usage(self) -> Usage:
        """Token counts of the whole request. A prompt's cached tokens are those that none of its choices computed."""
        n, plan = self.plan.n, self.plan
        generated = sum(end.completion_tokens for end in self.found.values())
        cached = 0
        for prompt in range(plan.prompts):
            of_prompt = [self.found[i].cached_tokens for i in range(prompt * n, prompt * n + n) if i in self.found]
            cached += min(of_prompt, default=0)
        return Usage(
            prompt_tokens=plan.prompt_tokens,
            completion_tokens=generated,
            total_tokens=plan.prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


class Shape(ABC):
    """Answers of one route.

    id, created: of a stream that goes on after its replica ended; None: new ones.
    """

    prefix: str

    def __init__(self, plan: Plan, id: str | None = None, created: int | None = None) -> None:
        self.plan = plan
        self.texts = plan.served.encoder.texts
        self.id = id or f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time()) if created is None else created
        self.model = plan.served.name

    @abstractmethod
    def whole(self, parts: Sequence[Part], ends: Ends) -> BaseModel:
        """The one answer of a request without a stream. parts: one a choice."""

    @abstractmethod
    def opening(self, index: int) -> BaseModel | None:
        """Chunk before a choice's first text, if the shape has one."""

    @abstractmethod
    def part(self, index: int, part: Part) -> BaseModel:
        """Chunk with more of a choice."""

    @abstractmethod
    def closing(self, index: int, rest: Part, reason: FinishReason) -> BaseModel:
        """Chunk with the finish reason of a choice."""

    @abstractmethod
    def usage(self, ends: Ends) -> BaseModel:
        """Chunk with the token counts."""

    def _copilot(self, part: Part) -> CopilotAnswer | None:
        return explained(part.tokens, self.texts) if self.plan.explain else None


class CompletionShape(Shape):
    """Answers of /v1/completions."""

    prefix = "cmpl"

    def whole(self, parts: Sequence[Part], ends: Ends) -> BaseModel:
        """As the base."""
        choices = [self._choice(index, part, _reason(ends, index)) for index, part in enumerate(parts)]
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=ends.usage())

    def opening(self, index: int) -> BaseModel | None:
        """There is none."""
        return None

    def part(self, index: int, part: Part) -> BaseModel:
        """As the base."""
        return self._chunk([self._choice(index, part, None)])

    def closing(self, index: int, rest: Part, reason: FinishReason) -> BaseModel:
        """As the base."""
        return self._chunk([self._choice(index, rest, reason)])

    def usage(self, ends: Ends) -> BaseModel:
        """As the base."""
        chunk = self._chunk([])
        chunk.usage = ends.usage()
        return chunk

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices)

    def _choice(self, index: int, part: Part, reason: FinishReason | None) -> CompletionChoice:
        plan = self.plan
        return CompletionChoice(
            index=index,
            text=part.text,
            logprobs=None if plan.named_tokens is None else completion_logprobs(part.tokens, self.texts),
            copilot=self._copilot(part),
            finish_reason=reason,
        )


class ChatShape(Shape):
    """Answers of /v1/chat/completions."""

    prefix = "chatcmpl"

    def whole(self, parts: Sequence[Part], ends: Ends) -> BaseModel:
        """As the base."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatAnswer(content=part.text),
                logprobs=self._logprobs(part),
                copilot=self._copilot(part),
                finish_reason=_reason(ends, index),
            )
            for index, part in enumerate(parts)
        ]
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=ends.usage())

    def opening(self, index: int) -> BaseModel | None:
        """The chunk that names the role."""
        return self._chunk([ChatChunkChoice(index=index, delta=ChatDelta(role="assistant", content=""))])

    def part(self, index: int, part: Part) -> BaseModel:
        """As the base."""
        return self._chunk([self._choice(index, part, ChatDelta(content=part.text), None)])

    def closing(self, index: int, rest: Part, reason: FinishReason) -> BaseModel:
        """As the base."""
        return self._chunk([self._choice(index, rest, ChatDelta(), reason)])

    def usage(self, ends: Ends) -> BaseModel:
        """As the base."""
        chunk = self._chunk([])
        chunk.usage = ends.usage()
        return chunk

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self.id, created=self.created, model=self.model, choices=choices)

    def _choice(self, index: int, part: Part, delta: ChatDelta, reason: FinishReason | None) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(part),
            copilot=self._copilot(part),
            finish_reason=reason,
        )

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        return None if self.plan.named_tokens is None else chat_logprobs(part.tokens, self.texts)


def _reason(ends: Ends, index: int) -> FinishReason:
    """Without new tokens (`max_tokens` 0) the text ends by its length."""
    end = ends.found.get(index)
    return "length" if end is None else end.finish_reason
