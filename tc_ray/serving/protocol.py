"""Requests and responses of the HTTP API, in OpenAI's shapes.

Invariant: what the server does not do is refused by name, never ignored. An unknown field is an error, and fields that
exist only for one neutral value (`n`, penalties, ...) accept just that value. Used by app.py, prompt.py and the tests.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from tc_ray.serving.errors import RequestError

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_LAM = 10.0
MIN_TEMPERATURE = 0.01
"""Smallest temperature above 0: below it the scaled logits leave the range of a float."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; chat completions default to the server's cap."""


class Body(BaseModel):
    """Base of request bodies: unknown fields are refused and no type is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


def _text_or(tag: str) -> Any:
    """Discriminator of a union of `(text)` and lists tagged `tag`, so that an error names one member only."""
    return Discriminator(lambda value: tag if isinstance(value, list) else "(text)")


def _is_text(value: str) -> str:
    """JSON can spell lone surrogates, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return value


Text = Annotated[str, AfterValidator(_is_text)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopText, Tag("(text)")] | Annotated[list[StopText], Field(max_length=MAX_STOPS), Tag("(list)")],
    _text_or("(list)"),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Prompt = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TokenId], Field(min_length=1), Tag("(ids)")], _text_or("(ids)")
]
Zero = Annotated[float, Field(ge=0, le=0)]


class CopilotOptions(Body):
    """Extension object `copilot`."""

    lam: float | None = Field(None, alias="lambda", ge=0, le=MAX_LAM, description="weight of the correction")


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="one more chunk with the token counts before [DONE]")


class GenerationFields(Body):
    """Fields that completions and chat completions share."""

    model: str = Field(description="a name that GET /v1/models lists")
    max_tokens: int | None = Field(None, ge=1, description="new tokens at most; the server has a cap")
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 is greedy decoding")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, description="extension: sample among the k likeliest tokens")
    stop: Stop | None = Field(None, description="up to 4 strings that end the text and are not part of it")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    lam: float | None = Field(
        None, alias="lambda", ge=0, le=MAX_LAM, description="extension: weight of the Copilot; default: as exported"
    )
    copilot: CopilotOptions | None = Field(None, description='extension: {"lambda": 0.5}')
    n: Literal[1] | None = Field(None, description="only 1")
    presence_penalty: Zero | None = Field(None, description="only 0")
    frequency_penalty: Zero | None = Field(None, description="only 0")

    def requested_lam(self) -> float | None:
        """lambda of this request, from either place; None for the exported default.

        Raises RequestError when both places give one.
        """
        nested = None if self.copilot is None else self.copilot.lam
        if self.lam is not None and nested is not None:
            raise RequestError(
                "Give lambda once: as `lambda` or as `copilot.lambda`.", param="copilot.lambda", code="invalid_value"
            )
        return nested if self.lam is None else self.lam

    def sampling_temperature(self) -> float:
        """Temperature, 0 for greedy. Raises RequestError between 0 and the smallest usable one."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if 0 < temperature < MIN_TEMPERATURE:
            raise RequestError(
                f"Field `temperature`: must be 0 (greedy) or at least {MIN_TEMPERATURE}.",
                param="temperature",
                code="invalid_value",
            )
        return temperature

    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def token_limit(self) -> tuple[str, int | None]:
        """Name of the field that bounds the new tokens, and its value if the client gave one."""
        return "max_tokens", self.max_tokens

    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk. Raises RequestError for stream_options without stream."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise RequestError(
                "Field `stream_options` needs `stream`: true.", param="stream_options", code="invalid_value"
            )
        return bool(self.stream_options.include_usage)


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Prompt = Field(description="text, or the token ids of one prompt")
    best_of: Literal[1] | None = Field(None, description="only 1")
    echo: Literal[False] | None = Field(None, description="only false")


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1), Tag("(parts)")], _text_or("(parts)")
]


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Content

    def text(self) -> str:
        """Content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    logprobs: Literal[False] | None = Field(None, description="only false")

    def token_limit(self) -> tuple[str, int | None]:
        """As the base; either of the two names, not both."""
        if self.max_completion_tokens is None:
            return super().token_limit()
        if self.max_tokens is not None:
            raise RequestError(
                "Give `max_tokens` or `max_completion_tokens`, not both.", param="max_tokens", code="invalid_value"
            )
        return "max_completion_tokens", self.max_completion_tokens


FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts; completion_tokens counts what was generated, the end token and stop strings included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """The text, or a piece of it in a stream."""

    index: Literal[0] = 0
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """Answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatAnswer(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """The answer of a chat completion."""

    index: Literal[0] = 0
    message: ChatAnswer
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What a chunk adds to the assistant's message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """The one choice of a chunk."""

    index: Literal[0] = 0
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """A chunk of a chat completion's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """One served model; `copilot.lambda` is the weight used when a request names none."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tc-ray"
    copilot: dict[str, float]


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """GET /health; `reason` says what is wrong when the status is 503."""

    status: Literal["ok", "unhealthy"]
    reason: str | None = None
