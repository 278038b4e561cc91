"""Token ids of an example: prompt ids, completion ids, end token; loss begins at `target_start`.

For an encoder-decoder the prompt is the encoder's source and ends with the end token, as in its pretraining; source and
target are joined in one row. Invariant: input_ids[:target_start] are exactly the prompt's ids at inference. Pure; called by
`encode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tc_ray.data.encode.prompts import render_prompt, with_system
from tc_ray.data.encode.special_text import encode_content, encode_rendered
from tc_ray.data.source.messages import Turn, texts_in
from tc_ray.data.source.shapes import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tc_ray.config.data import DataSection

_SHOWN_CHARS = 60
_MARK = "\ue000tc-ray-function"


class TemplateLacksError(ValueError):
    """The chat template does not write what a message holds, or not where the assistant's answer begins."""


@dataclass(frozen=True)
class Tokens:
    """`input_ids` (prompt + completion + end token); `was_cut`: the completion was too long and lost its end."""

    input_ids: list[int]
    target_start: int
    was_cut: bool


def prompt_ids(
    turns: Sequence[Turn],
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    encoder_decoder: bool = False,
    tools: Sequence[Any] = (),
) -> list[int]:
    """Ids of the prompt. A plain prompt begins with the begin token if the tokenizer adds one to texts."""
    ids = _rendered_ids(turns, config, tokenizer, tools, opens=True)
    if config.template == "plain":
        ids = [*_begin(tokenizer), *ids]
    if encoder_decoder:
        ids.append(tokenizer.eos_token_id)
    return ids


def completion_ids(completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the completion, end token included."""
    return [*encode_content(completion, tokenizer), tokenizer.eos_token_id]


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text without a prompt: what it begins with, and its targets, end token included.

    It begins with the begin token if the tokenizer adds one to texts; without one the first token is not a target, because
    nothing comes before it that could predict it.
    """
    ids = [*_begin(tokenizer), *completion_ids(text, tokenizer)]
    return ids[:1], ids[1:]


def encode(
    example: Example, config: DataSection, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False
) -> Tokens | None:
    """Tokens of one example, at most `config.cutoff_tokens`; None when its prompt leaves no space for a target.

    Without a completion the ids are the prompt's and target_start is their number. A completion that is too long loses its
    end, and the end token too, so that the model does not learn to stop there. Raises TemplateLacksError.
    """
    if example.whole:
        ids, targets = text_ids(example.completion or "", tokenizer)
    else:
        ids = prompt_ids(example.turns, config, tokenizer, encoder_decoder, example.tools)
        targets = _targets(example, ids, config, tokenizer)
    start = len(ids)
    if example.completion is None:
        return Tokens(ids, start, False) if start <= config.cutoff_tokens else None
    if start >= config.cutoff_tokens:
        return None
    ids = ids + targets
    return Tokens(ids[: config.cutoff_tokens], start, len(ids) > config.cutoff_tokens)


def _targets(example: Example, prompt: list[int], config: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that follow the prompt: the completion as it is written, or with tool calls as the chat template writes the message."""
    if example.completion is None:
        return []
    turns = (*example.turns, Turn("assistant", example.completion or None, example.more))
    if example.renders:
        _check_written(turns, config, tokenizer, example.tools)
    if not example.more:
        return completion_ids(example.completion, tokenizer)
    whole = _rendered_ids(turns, config, tokenizer, example.tools, opens=False)
    if whole[: len(prompt)] != prompt:
        raise TemplateLacksError(
            "the chat template does not begin the assistant's message as its generation prompt does"
        )
    ids, end = whole[len(prompt) :], tokenizer.eos_token_id
    if end in ids:
        return ids[: len(ids) - ids[::-1].index(end)]
    while ids and not tokenizer.decode(ids[-1:]).strip():
        ids.pop()
    return [*ids, end]


def _check_written(
    turns: Sequence[Turn], config: DataSection, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any]
) -> None:
    """Raise TemplateLacksError where the rendered text lacks a tool, or the reasoning to learn: templates skip what they do not
    know. Reasoning of earlier messages is left out by many on purpose."""
    turns = [Turn(t.role, t.content, {**t.more, **_marked_calls(t)}) for t in turns]
    tools = [{**tool, "function": _marked(tool["function"])} for tool in tools]
    names = [tool["function"]["name"] for tool in tools]
    names += [call["function"]["name"] for turn in turns for call in turn.more.get("tool_calls", ())]
    names.append(turns[-1].more.get("reasoning_content", "").strip())
    text = render_prompt(turns, config, tokenizer, tools, opens=False)
    for name in names:
        if name not in text:
            raise TemplateLacksError(f"the chat template does not write {name.removesuffix(_MARK)[:_SHOWN_CHARS]!r}")


def _marked_calls(turn: Turn) -> dict[str, Any]:
    calls = turn.more.get("tool_calls")
    return {"tool_calls": [{**call, "function": _marked(call["function"])} for call in calls]} if calls else {}


def _marked(function: dict[str, Any]) -> dict[str, Any]:
    """A function under a name that no other text holds."""
    return {**function, "name": function["name"] + _MARK}


def _rendered_ids(
    turns: Sequence[Turn], config: DataSection, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any], *, opens: bool
) -> list[int]:
    turns = with_system(turns, config)
    given = [*(turn.content for turn in turns), *(dict(turn.more) for turn in turns), list(tools)]

    def render(texts: Sequence[str]) -> str:
        left = iter(texts)
        made = [_with_texts(one, left) for one in given]
        contents, mores = made[: len(turns)], made[len(turns) : -1]
        written = [Turn(turn.role, content, more) for turn, content, more in zip(turns, contents, mores, strict=True)]
        return render_prompt(written, config, tokenizer, made[-1], opens=opens)

    return encode_rendered([text for one in given for text in texts_in(one)], render, tokenizer)


def _with_texts(value: Any, left: Any) -> Any:
    """A JSON value with the next texts in place of its own, in the order of `texts_in`."""
    if isinstance(value, str):
        return next(left)
    if isinstance(value, dict):
        return {next(left): _with_texts(one, left) for one in value.values()}
    return [_with_texts(one, left) for one in value] if isinstance(value, list) else value


def _begin(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin token, if the tokenizer puts one before texts."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []
