"""The prompt text: turns rendered by the tokenizer's chat template or by the plain template.

Invariant: training, evaluation and serving render prompts alike. Called by `tokenize`; an exported model carries
`serving_template`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

from tc_ray.data.source.messages import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tc_ray.config.data import DataSection

TEMPLATE_DAY = date(2024, 7, 26)
"""What a chat template that writes today's date gets, so that a resumed run has the same rows: the day that Llama's template
has where there is no clock."""
_CODES = [*"aAbBcdHIjmMpSuUwWxXyYzZ", "-d", "-m"]
_DAY = "".join(f"|replace('%{code}', {TEMPLATE_DAY.strftime('%' + code)!r})" for code in _CODES)
_CLOCK = "{% macro strftime_now(format) %}{{ format" + _DAY + " }}{% endmacro +%}"  # transformers passes on no function


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    opens: bool = True,
    continues: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The messages as text, by the tokenizer's own chat template.

    opens: up to where the answer begins. continues: up to the end of the last message's content. variables: of the template.
    """
    text = tokenizer.apply_chat_template(
        list(messages),
        chat_template=_CLOCK + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=opens,
        continue_final_message=continues,
        **(variables or {}),
    )
    assert isinstance(text, str)  # one conversation in, one text out
    return text


def render_prompt(
    turns: Sequence[Turn],
    config: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Any] = (),
    *,
    opens: bool = True,
) -> str:
    """The full prompt text, up to where the completion begins.

    Contents are unchanged, unless the tokenizer's own chat template changes them (many strip blanks). tools: definitions that the
    chat template gets. opens: as for `render_chat`; the plain template always opens.
    """
    turns = with_system(turns, config)
    if config.template == "plain":
        return config.plain_template.replace("{prompt}", readable_prompt([t for t in turns if t.content]))
    messages = [{"role": turn.role, "content": turn.content, **turn.more} for turn in turns]
    return render_chat(tokenizer, messages, opens=opens, variables={"tools": list(tools)} if tools else None)


def with_system(turns: Sequence[Turn], config: DataSection) -> Sequence[Turn]:
    """The turns, after `config.system` when they have no system message of their own.

    An empty string keeps a template from adding its default.
    """
    if config.system is None or turns[0].role == "system":
        return turns
    return (Turn("system", config.system), *turns)


def readable_prompt(turns: Sequence[Turn]) -> str:
    """The prompt for people and for the split: the user's text alone, or all turns with their roles and tool calls."""
    if len(turns) == 1:
        return turns[0].content or ""
    return "\n".join(f"{turn.role}: {_readable(turn)}" for turn in turns)


def _readable(turn: Turn) -> str:
    calls = [call["function"] for call in turn.more.get("tool_calls", ())]
    written = [turn.content or "", *(json.dumps(call, ensure_ascii=False) for call in calls)]
    return "\n".join(part for part in written if part)


def serving_template(config: DataSection) -> str | None:
    """Chat template (Jinja) of an exported model, which renders what `render_prompt` does; None: the tokenizer's own.

    With `template: chat` the tokenizer's own stays, also with `data.system`: the caller sends the system message.
    """
    if config.template == "chat":
        return None
    before, after = config.plain_template.split("{prompt}", 1)
    system = json.dumps(config.system) if config.system else "none"
    return (
        f"{{%- set system = {system} -%}}"
        "{%- set turns = messages -%}"
        "{%- if system and messages[0]['role'] != 'system' -%}"
        "{%- set turns = [{'role': 'system', 'content': system}] + messages -%}{%- endif -%}"
        f"{{{{- {json.dumps(before)} -}}}}"
        "{%- if turns | length == 1 -%}{{- turns[0]['content'] -}}"
        "{%- else -%}{%- for turn in turns -%}{{- turn['role'] + ': ' + turn['content'] -}}"
        "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
        f"{{{{- {json.dumps(after)} -}}}}"
    )
