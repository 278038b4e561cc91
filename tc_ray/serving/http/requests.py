"""Request bodies of the HTTP API, in OpenAI's shapes, and how they are read.

Invariant: what the server does not do is refused by name, never ignored: an unknown field is an error, and no type is
converted silently. Bodies are parsed here and nowhere else, by pydantic's own parser, which bounds depth and numbers.
Used by the routes, plan.py and schema.py.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
)

from tc_ray.config.section import Lam
from tc_ray.serving.errors import RequestError, from_validation, invalid_value

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_TOP_LOGPROBS = 20
MAX_SCORED = 64
"""Completions of one /v1/score request."""
MAX_MESSAGES = 1024
MAX_PARTS = 100
"""Of one message."""
MAX_CONTAINERS = 4096
MAX_NAMES = 8192
"""Lists and objects, and names in objects, of a body: a megabyte of `[5],` would take the parser a second."""
MIN_TEMPERATURE = 0.01
"""Smallest temperature above 0: below it the scaled logits leave the range of a float."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; chat completions default to the server's cap."""
LAM_TWICE = "give it once: as `lambda` or as `copilot.lambda`"


class Body(BaseModel):
    """Base of request bodies: unknown fields are refused and no type is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(shape: type[AnyBody], content_type: str, raw: bytes) -> AnyBody:
    """The body of a request. Raises RequestError 400 that names the field."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            "The body must be a JSON object, sent with Content-Type: application/json.", code="invalid_content_type"
        )
    _check_size(raw)
    try:
        return shape.model_validate_json(raw)
    except ValidationError as error:
        raise from_validation(error) from None


def _check_size(raw: bytes) -> None:
    """Raise RequestError for a body of more parts than any request has."""
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS or raw.count(b":") > MAX_NAMES:
        # Not those inside of strings: every second piece between quotes that are not escaped.
        bare = b"".join(raw.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
        if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS or bare.count(b":") > MAX_NAMES:
            raise RequestError(
                f"The body has more than {MAX_CONTAINERS} lists and objects, or more than {MAX_NAMES} names in them.",
                code="invalid_body",
            )


def _text_or(tag: str) -> Any:
    """Discriminator of a union of `(text)` and lists tagged `tag`, so that an error names one member only."""
    return Discriminator(lambda value: tag if isinstance(value, list) else "(text)")


def _kind_of_prompt(value: Any) -> str:
    """Tag of a union of text, ids, texts and lists of ids."""
    if not isinstance(value, list):
        return "(text)"
    first = value[0] if value else None
    return "(texts)" if isinstance(first, str) else "(id lists)" if isinstance(first, list) else "(ids)"


def _is_text(value: str) -> str:
    """JSON can spell lone surrogates, which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds a lone surrogate, which is no character") from None
    return value


def _is_temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


Text = Annotated[str, AfterValidator(_is_text)]
NonEmptyText = Annotated[Text, Field(min_length=1)]
StopText = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopText, Tag("(text)")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("(list)")],
    _text_or("(list)"),
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[Annotated[NonEmptyText, Tag("(text)")] | Annotated[Ids, Tag("(ids)")], _text_or("(ids)")]
Prompts = Annotated[
    Annotated[NonEmptyText, Tag("(text)")]
    | Annotated[Ids, Tag("(ids)")]
    | Annotated[list[NonEmptyText], Field(max_length=MAX_SCORED, fail_fast=True), Tag("(texts)")]
    | Annotated[list[Ids], Field(max_length=MAX_SCORED, fail_fast=True), Tag("(id lists)")],
    Discriminator(_kind_of_prompt),
]
Temperature = Annotated[
    float,
    Field(ge=0, le=2),
    AfterValidator(_is_temperature),
    WithJsonSchema({"anyOf": [{"const": 0}, {"type": "number", "minimum": MIN_TEMPERATURE, "maximum": 2}]}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def split_prompts(prompts: str | list[Any]) -> list[str | list[int]]:
    """The single prompts of a `Prompts` field."""
    return prompts if isinstance(prompts, list) and isinstance(prompts[0], (str, list)) else [prompts]


class CopilotWeight(Body):
    """Extension object `copilot` where only the weight matters."""

    lam: Lam | None = Field(None, alias="lambda", description="weight of the correction; default: as exported")


class CopilotOptions(CopilotWeight):
    """Extension object `copilot`."""

    explain: bool | None = Field(
        None, description="tell for each token what the Pilot would have said and how far the Copilot moved it"
    )


class CompletionCopilotOptions(CopilotOptions):
    """Extension object `copilot` of completions."""

    score_after: Annotated[StopText, Field(description="see score_after of the query")] | None = Field(
        None,
        description="with `echo` and `logprobs`: the Copilot begins after the last occurrence of this text in the prompt, "
        "and the tokens before it are scored by the Pilot alone; without it the Copilot begins at the second token",
    )


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(None, description="one more chunk with the token counts before [DONE]")


class Weighted(Body):
    """Fields of every request to a model."""

    model: str = Field(description="a name that GET /v1/models lists")
    lam: Lam | None = Field(None, alias="lambda", description="extension: short for `copilot.lambda`; give one of them")
    copilot: CopilotWeight | None = None

    def requested_lam(self) -> float | None:
        """lambda of this request, from either place; None for the exported default.

        Raises RequestError when both places give one.
        """
        nested = None if self.copilot is None else self.copilot.lam
        if self.lam is not None and nested is not None:
            raise invalid_value("copilot.lambda", LAM_TWICE)
        return nested if self.lam is None else self.lam


class GenerationFields(Weighted):
    """Fields that completions and chat completions share."""

    max_tokens: int | None = Field(None, ge=1, description="new tokens of a choice at most; the server has a cap")
    temperature: Temperature | None = Field(None, description="default 1; 0 is greedy decoding")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=2**31 - 1, description="extension: sample among the k likeliest tokens")
    stop: Stop | None = Field(None, description="up to 4 strings that end the text and are not part of it")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="choice i draws from seed + i; drawn by the server if absent"
    )
    presence_penalty: Penalty | None = Field(None, description="subtracted from the logits of tokens generated before")
    frequency_penalty: Penalty | None = Field(None, description="the same, once an occurrence")
    n: int | None = Field(None, ge=1, description="choices of each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="only with `stream`: true")

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
            raise invalid_value("stream_options", "needs `stream`: true")
        return bool(self.stream_options.include_usage)

    @abstractmethod
    def named_tokens(self) -> int | None:
        """How many of the likeliest tokens to name beside each token; None: no log-probabilities at all."""

    def explains(self) -> bool:
        """Whether the answer tells what the Copilot changed."""
        return isinstance(self.copilot, CopilotOptions) and bool(self.copilot.explain)


class CompletionRequest(GenerationFields):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="text, token ids, or a list of either; choices come prompt by prompt")
    max_tokens: int | None = Field(
        None, ge=0, description="new tokens of a choice at most, default 16; 0 only with `echo`; the server has a cap"
    )
    best_of: int | None = Field(None, ge=1, description="only the value of `n`")
    echo: bool | None = Field(None, description="begin the text, and the log-probabilities, with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="likeliest tokens to name beside each token")
    copilot: CompletionCopilotOptions | None = None

    def named_tokens(self) -> int | None:
        """As the base."""
        return self.logprobs

    def check(self) -> None:
        """Raise RequestError for fields that contradict each other."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid_value("best_of", "must equal `n`: every choice generated is returned")
        if self.max_tokens == 0 and not self.echo:
            raise invalid_value("max_tokens", "0 needs `echo`: true")
        if self.copilot is not None and self.copilot.score_after is not None and not self.scores_prompt():
            raise invalid_value("copilot.score_after", "needs `echo`: true and `logprobs`")

    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens get log-probabilities."""
        return bool(self.echo) and self.logprobs is not None


class TextPart(Body):
    """One part of a message's content."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("(parts)")],
    _text_or("(parts)"),
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

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, description="newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="only with `logprobs`: true")
    copilot: CopilotOptions | None = None

    def named_tokens(self) -> int | None:
        """As the base. Raises RequestError for top_logprobs without logprobs."""
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_value("top_logprobs", "needs `logprobs`: true")
        return (self.top_logprobs or 0) if self.logprobs else None

    def token_limit(self) -> tuple[str, int | None]:
        """As the base; either of the two names, not both."""
        if self.max_completion_tokens is None:
            return super().token_limit()
        if self.max_tokens is not None:
            raise invalid_value("max_tokens", "give it or `max_completion_tokens`, not both")
        return "max_completion_tokens", self.max_completion_tokens


class ScoreBody(Weighted):
    """POST /v1/score."""

    prompt: Prompt = Field(description="text or token ids")
    completion: Prompts = Field(
        description="text, token ids, or a list of either. A text is tokenised by itself, as in training, so that it begins "
        "at a token of its own; to score another cut, send ids"
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens of the fused model to name at each place"
    )
