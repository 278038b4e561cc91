"""Request bodies of the HTTP API in OpenAI's shapes, and how they are parsed.

Invariant: what the server does not do is refused by name, never ignored: an unknown field is an error, and no type is
converted silently. What changes no answer stands in accepted.py, what depends on the model or on the limits of the server
in generate.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Discriminator, Field, StrictInt, Tag, model_validator

from tc_ray.config.section import Lam
from tc_ray.serving.errors import contradiction
from tc_ray.serving.http.accepted import Labels, Neutral, NeutralChat, NeutralCompletion, NeutralMessage, Strict

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 200
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = MAX_PROMPTS = 1024
MAX_FIELDS = 100
MAX_BIASES = 300
MAX_STOP_TOKENS = 64
MAX_VARIABLES = 32
TOKEN_LIMITS = {"max_tokens", "max_completion_tokens"}
MIN_TEMPERATURE = 0.01
"""A smaller one is greedy decoding: the scaled logits would leave the range of a float."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; chat completions default to the server's cap."""


class Body(Strict):
    """Base of request bodies."""

    @model_validator(mode="before")
    @classmethod
    def _plain_fields(cls, body: Any) -> Any:
        names = body.keys() if isinstance(body, dict) else set()
        if len(names) > MAX_FIELDS:  # an error for each unknown field would hold up the replica
            unknown = next((name for name in body if name not in cls.model_fields), "body")
            raise contradiction(unknown, f"is one of {len(body)} fields; at most {MAX_FIELDS} are read")
        if names >= TOKEN_LIMITS and "max_tokens" in cls.model_fields:
            older, newer = body["max_tokens"], body["max_completion_tokens"]
            if None not in (older, newer) and older != newer:
                raise contradiction("max_completion_tokens", "it and `max_tokens` differ; give one of them")
            dropped = "max_tokens" if older is None else "max_completion_tokens"
            return {name: value for name, value in body.items() if name != dropped}
        return body


def _text_or(tag: str) -> Any:
    """Discriminator of a union of `(text)` and lists tagged `tag`. An error then names one member only."""
    return Discriminator(lambda value: tag if isinstance(value, list) else "(text)")


def _kind_of_prompt(value: Any) -> str:
    if not isinstance(value, list):
        return "(text)"
    first = value[0] if value else None
    return "(texts)" if isinstance(first, str) else "(id lists)" if isinstance(first, list) else "(ids)"


Text = Annotated[str, Field(min_length=0)]
"""A bound has pydantic refuse lone surrogates, which no tokenizer takes."""
NonEmptyText = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopText, Tag("(text)")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("(list)")],
    _text_or("(list)"),
]
TokenId = Annotated[int, Field(ge=0)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[Annotated[NonEmptyText, Tag("(text)")] | Annotated[Ids, Tag("(ids)")], _text_or("(ids)")]
Prompts = Annotated[
    Annotated[NonEmptyText, Tag("(text)")]
    | Annotated[Ids, Tag("(ids)")]
    | Annotated[list[NonEmptyText], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(texts)")]
    | Annotated[list[Ids], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("(id lists)")],
    Discriminator(_kind_of_prompt),
]


def split_prompts(prompts: str | list[Any]) -> list[str | list[int]]:
    """The single prompts of a `Prompts` field."""
    return prompts if isinstance(prompts, list) and isinstance(prompts[0], (str, list)) else [prompts]


class Resume(BaseModel):
    """Id and time of a stream whose replica ended, for a repeat with the same chunks. Sent by the failover proxy."""

    id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")
    created: StrictInt


class CopilotWeight(Body):
    """Extension object `copilot` of a route that only takes the weight."""

    lam: Lam | None = Field(None, alias="lambda", description="weight of the correction; default: as exported")


class CopilotOptions(CopilotWeight):
    explain: bool | None = Field(
        None,
        description="report for each token what the Pilot would have chosen and how far the Copilot moved the distribution",
    )


class CompletionCopilotOptions(CopilotOptions):
    score_after: StopText | None = Field(
        None,
        description="with `echo` and `logprobs`: the Copilot begins after the last occurrence of this text in the prompt, "
        "and the tokens before it are scored by the Pilot alone; without it the Copilot begins at the second token",
    )


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="one more chunk with the token counts before [DONE]")
    continuous_usage_stats: bool | None = Field(None, description="the token counts so far in every chunk")


class Weighted(Body, Labels):
    """Fields of every request to a model."""

    model: str = Field(min_length=0, description="a name that GET /v1/models lists")
    copilot: CopilotWeight | None = None

    @property
    def weight(self) -> float | None:
        """lambda of this request; None: the exported one."""
        return None if self.copilot is None else self.copilot.lam


class GenerationFields(Weighted, Neutral):
    """Fields that completions and chat completions share."""

    max_tokens: int | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("max_tokens", "max_completion_tokens"),
        description="new tokens of a choice at most; the server has a cap. Newer name: `max_completion_tokens`",
    )
    temperature: float | None = Field(None, ge=0, le=2, description="default 1; 0 is greedy decoding")
    top_p: float | None = Field(None, ge=0, le=1, description="0: the likeliest token alone")
    top_k: int | None = Field(
        None, ge=-1, le=2**31 - 1, description="extension: sample among the k likeliest tokens; -1 or 0: among all"
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.1,
        le=10,
        description="extension: divides logits above 0 of tokens that were there, multiplies others",
    )
    logit_bias: dict[TokenName, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=MAX_BIASES, description="token id to what is added to its logit"
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        le=2**31 - 1,
        description="extension: no end token and none of `stop_token_ids` before so many tokens",
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = Field(
        None, description="extension: tokens that end the text and are not part of it"
    )
    ignore_eos: bool | None = Field(None, description="extension: the model's end tokens end nothing")
    stop: Stop | None = Field(None, description="up to 4 strings that end the text and are not part of it")
    seed: int | None = Field(
        None, ge=-(2**63), le=2**63 - 1, description="choice i draws from seed + i; drawn by the server if absent"
    )
    n: int | None = Field(None, ge=1, description="choices of each prompt")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="only with `stream`: true")
    copilot: CopilotOptions | None = None

    @model_validator(mode="after")
    def _options_agree(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options", "needs `stream`: true")
        if self.min_tokens and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise contradiction("min_tokens", "is more than `max_tokens`")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_always(self) -> bool:
        """Whether every chunk of a stream has the token counts."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def explains(self) -> bool:
        """Whether the response reports what the Copilot changed."""
        return self.copilot is not None and bool(self.copilot.explain)


class CompletionRequest(GenerationFields, NeutralCompletion):
    """POST /v1/completions."""

    prompt: Prompts = Field(description="text, token ids, or a list of either; choices come prompt by prompt")
    max_tokens: int | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("max_tokens", "max_completion_tokens"),
        description="new tokens of a choice at most, default 16; 0 only with `echo`; the server has a cap",
    )
    echo: bool | None = Field(None, description="begin the text, and the log-probabilities, with the prompt")
    logprobs: int | None = Field(None, ge=0, le=5, description="likeliest tokens to name beside each token")
    copilot: CompletionCopilotOptions | None = None

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise contradiction("max_tokens", "0 needs `echo`: true")
        if self.score_after is not None and not self.scores_prompt:
            raise contradiction("copilot.score_after", "needs `echo`: true and `logprobs`")
        return self

    @property
    def named_tokens(self) -> int | None:
        """How many of the likeliest tokens to name beside each token; None: no log-probabilities at all."""
        return self.logprobs

    @property
    def score_after(self) -> str | None:
        """The text after which the Copilot begins in an echoed prompt."""
        return None if self.copilot is None else self.copilot.score_after

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own tokens get log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    def with_query(self, lam: float | None, score_after: str | None) -> CompletionRequest:
        """This body with the query's values where it has none of its own."""
        own = self.copilot or CompletionCopilotOptions()
        weight = lam if own.lam is None else own.lam
        merged = own.model_copy(update={"lam": weight, "score_after": own.score_after or score_after})
        return self.model_copy(update={"copilot": merged})


class TextPart(Body):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("(parts)")],
    _text_or("(parts)"),
]


class ChatMessage(Body, NeutralMessage):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = Field(description="null only of an assistant: an empty text")

    def text(self) -> str:
        """Content as one string."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)

    @property
    def turn(self) -> str:
        """The role as chat templates know it."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(GenerationFields, NeutralChat):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="only with `logprobs`: true")
    add_generation_prompt: bool | None = Field(
        None, description="extension: the template opens an answer; default true, unless `continue_final_message`"
    )
    continue_final_message: bool | None = Field(
        None, description="extension: the answer goes on with the last message, which stays open"
    )
    chat_template_kwargs: dict[VariableName, Text | bool | int | float | None] | None = Field(
        None, max_length=MAX_VARIABLES, description="extension: variables of the model's chat template"
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise contradiction("top_logprobs", "needs `logprobs`: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise contradiction("add_generation_prompt", "false is needed with `continue_final_message`: true")
        for index, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise contradiction(f"messages[{index}].content", "only an assistant's may be null; send a text")
        return self

    @property
    def named_tokens(self) -> int | None:
        """How many of the likeliest tokens to name beside each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ScoreBody(Weighted):
    """POST /v1/score."""

    prompt: Prompt = Field(description="text or token ids")
    completion: Prompts = Field(
        description="text, token ids, or a list of either. A text is tokenised by itself, as in training, so that it begins "
        "at a token of its own; to score another cut, send ids"
    )
    end_token: bool | None = Field(
        None, description="score the end token after each completion too, as rankings of items do"
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="likeliest tokens of the fused model to name at each place"
    )
