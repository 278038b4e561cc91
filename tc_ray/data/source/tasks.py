"""A record of a known task in the shape that every record has: prompt, completion, answer, options.

Invariant: a record that has a prompt of its own keeps it, so files made for training and the task's original files are read by
one form. Pure; called by `encode`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tc_ray.data.source.records import BadRow
from tc_ray.data.source.task_form import TaskForm

_OWN_PROMPT = ("messages", "conversations", "prompt", "instruction")


class _Missing(Exception):
    """The record lacks a field that the form names."""


def shaped(value: Any, form: TaskForm) -> Any:
    """The record with the fields of the form, or what is wrong with it. What is no object is left to `to_example`."""
    if not isinstance(value, dict):
        return value
    # null, and NaN, which pandas writes for it: the record lacks the field
    made = value = {
        name: one for name, one in value.items() if one is not None and not (isinstance(one, float) and math.isnan(one))
    }
    try:
        if not any(name in value for name in _OWN_PROMPT):
            value = value | {"given": _filled(form.answer, value)}
            answer = _answer(value["given"].strip(), form)
            if isinstance(answer, BadRow):
                return answer
            made = {
                "prompt": _filled(form.prompt, value),
                "completion": _filled(form.completion, value | {"answer": answer}),
                "answer": answer,
            }
        if form.metric != "choice":
            made.pop("options", None)  # of the record, not completions
        if form.options:
            options = (_filled(option, value) for option in form.options)
            made["options"] = [_filled(form.completion, value | {"answer": option}) for option in options]
    except _Missing as missing:
        return BadRow(str(missing), "is missing, or not as the task's form wants it", "correct the record or data.task")
    return made


def _answer(text: str, form: TaskForm) -> str | BadRow:
    if form.answer_pattern is not None:
        found = re.search(form.answer_pattern, text)
        if found is None:
            return BadRow("answer", f"{form.answer_pattern!r} of the task's form is not in it", "correct the record")
        text = found.group(found.re.groups).strip()
    if not form.names:
        return text
    if text not in form.names and text not in form.names.values():
        return BadRow("answer", f"is {text!r}", f"use one of {', '.join(form.names)}")
    return form.names.get(text, text)


def _filled(text: str, value: dict[str, Any]) -> str:
    try:
        return text.format_map(value)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        names = re.findall(r"{(\w+)", text)
        raise _Missing(next((name for name in names if name not in value), names[0] if names else "")) from error
