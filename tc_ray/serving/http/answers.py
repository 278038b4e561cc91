"""Response bodies of the HTTP API, in OpenAI's shapes.

Invariants: every body and every chunk that the server sends is one of these. The failover proxy reads the order of fields: of a
choice, the index comes first and the text before log-probabilities. JSON has no infinity: the log of 0 is -88.0.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

LOG_OF_ZERO = -88.0
"""What stands for log 0, and the least log-probability of a token: clients take `exp(-value)` in float32 for a perplexity."""

Logprob = Annotated[float, BeforeValidator(lambda value: max(value, LOG_OF_ZERO))]
FinishReason = Literal["stop", "length"]


class Answer(BaseModel):
    """Base of everything sent."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Usage(Answer):
    """Token counts. completion_tokens counts what was generated, the end token and stop strings included."""

    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)
    total_tokens: int = Field(ge=0)


class ExplainedToken(Answer):
    """What the correction did at one token; probabilities of the distributions before temperature."""

    token: str
    pilot_token: str = Field(description="likeliest token of the Pilot at this place")
    pilot: float = Field(ge=0, description="the Pilot's probability of `token`")
    fused: float = Field(ge=0, description="the fused model's")
    moved: float = Field(ge=0, description="total variation distance of the two distributions, 0 to 1")


class CopilotAnswer(Answer):
    """Response to `copilot.explain`: one entry for each token generated; in a chunk, since the last chunk."""

    tokens: list[ExplainedToken]


class CompletionLogprobs(Answer):
    """log p~ of each token, before temperature. A token that is no whole character is `bytes:\\xf0\\x9f`."""

    tokens: list[str]
    token_logprobs: list[Logprob | None] = Field(description="null for the first token of an echoed prompt")
    top_logprobs: list[dict[str, Logprob] | None] = Field(description="the likeliest tokens and the chosen one")


class TokenLogprob(Answer):
    token: str
    logprob: Logprob
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionChoice(Answer):
    """A text, or a piece of it in a stream. Choice i of prompt p has the index p * n + i."""

    index: int = Field(ge=0)
    text: str
    logprobs: CompletionLogprobs | None = None
    copilot: CopilotAnswer | None = None
    finish_reason: FinishReason | None = None


class Headed(Answer):
    """What the responses and chunks of generations and scores begin with."""

    id: str
    created: int
    model: str


class Completion(Headed):
    """Response of /v1/completions, and each chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatAnswer(Answer):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Answer):
    index: int = Field(ge=0)
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    copilot: CopilotAnswer | None = None
    finish_reason: FinishReason


class ChatCompletion(Headed):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Answer):
    index: int = Field(ge=0)
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    copilot: CopilotAnswer | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(Headed):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ScoredTop(Answer):
    id: int
    token: str
    fused: Logprob


class ScoredPlace(Answer):
    """One token of a scored completion: log p^ (Pilot) and log p~ (fused)."""

    id: int
    token: str
    pilot: Logprob
    fused: Logprob
    top_logprobs: list[ScoredTop] | None = Field(None, description="likeliest tokens of the fused model, best first")


class ScoredCompletion(Answer):
    """One completion: its tokens and the sums of what stands there."""

    index: int = Field(ge=0)
    tokens: list[ScoredPlace]
    token_count: int = Field(ge=1)
    pilot: float = Field(description="log p^ of the completion: the sum over its tokens")
    fused: float = Field(description="log p~ of the completion: the sum over its tokens")


class ScoreAnswer(Headed):
    object: Literal["score"] = "score"
    lam: float = Field(serialization_alias="lambda", description="weight of the correction that was used")
    completions: list[ScoredCompletion]
    usage: Usage


class CopilotCard(Answer):
    """The Copilot of a served model."""

    lam: float = Field(serialization_alias="lambda", description="weight used when a request names none")
    version: str | None = Field(None, description="which Copilot is served; changes when a newer one was loaded")


class ModelCard(Answer):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tc-ray"
    context_tokens: int = Field(description="prompt and new tokens together")
    copilot: CopilotCard


class ModelList(Answer):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class State(Answer):
    """GET /health. `reason` states what is wrong when the status is 503."""

    status: Literal["ok", "unavailable"]
    reason: str | None = None


class ErrorDetail(Answer):
    message: str
    type: Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
    param: str | None = Field(description="the field at fault, as the client wrote it")
    code: str | None = Field(description="a stable word for programs")


class ErrorEnvelope(Answer):
    """Every error body, and the last event of a stream that breaks off."""

    error: ErrorDetail


def as_json(answer: BaseModel) -> str:
    """A response body or chunk as it is sent. ASCII: some clients end a line of a stream at other Unicode line ends too."""
    return answer.model_dump_json(by_alias=True, ensure_ascii=True)
