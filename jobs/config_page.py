"""The page docs/config.md, made from the schema: `python -m jobs.config_page > docs/config.md`.

A test compares the page with what this makes, so the two cannot drift apart.
"""

from __future__ import annotations

import sys
import types
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from tc_ray.config.fields import ConfigField, config_fields
from tc_ray.config.schema import RunConfig
from tc_ray.config.training import fast_dtype

_INTRODUCTION = """# Configuration

For those who write a recipe or change one: every setting, its default, what it may be, and what it means. The page is
made from `tc_ray/config/` by `python -m jobs.config_page > docs/config.md`; do not edit it by hand.

A recipe is a YAML file of sections, each with some of the fields below. A field that it leaves out has the default. Any
field can be set on the command line after the recipe, once each:

    tc-ray train RECIPE pilot.learning_rate=1e-4 copilot.layers=[1,3]

The value of a text or path field is taken as it is typed, quotes and `#` included; where such a field may be null,
`null` means none. Every other value is YAML (`null`, `true`, `[1, 2]`, `1e-4`). Numbers are finite. An unknown key is
an error that names the nearest valid one, with the file and line. The run folder keeps the resolved configuration as
`config.yaml`, without secrets.

In a value of a recipe, a study or a Serve config file, `${NAME}` is the environment variable NAME, `${NAME:-default}`
the default where that is not set or empty; the result is read as on the command line. A variable that is not set and
has no default is an error, unless another value replaces the field. `$${` are the characters `${`; `${{` stays as it
is. In a flow list or mapping quote them: `["${A}", "${B}"]`. Values on the command line and saved configurations are
not expanded. Secrets belong in `log.storage_options` or in an address; there they are struck out of whatever is saved.

`tc-ray config schema` prints the JSON schema of a recipe, `--study` that of a study. `tc-ray init` writes it beside the
recipe, whose first line names it: an editor with the YAML language server then completes fields and marks mistakes.
The option `--install-completion` of `tc-ray` makes the shell complete commands and options.

A run that is resumed must have the settings of its first start, except for the fields whose column "on resume" says
"may change": they change nothing that was already written.

Relative paths of data and model folders start at the current folder, else at the folder of the recipe.

Rules over several fields:

- `pilot.batch_size` must be at least `resources.pilot_workers`, `copilot.batch_size` at least
  `resources.copilot_workers`. They need not divide.
- `resources.pilot_min_workers` must not be above `resources.pilot_workers`.
- `copilot.schedule: lockstep` needs `log.enabled`.
- `log.keep_rounds` must be at least `copilot.buffer_rounds`.
- `serving.drain_s` must be at least `serving.request_timeout_s`, `serving.max_replicas` at least `serving.replicas`.
- `fusion.lam_grid` must contain 0.
- `pilot.patience` and `pilot.final: best` need `pilot.validate_every`.
- `data.convert` is for `data.format: examples`.
- `fusion.metric: ranking` needs `data.format: sequences`, which excludes `data.validation` and `data.test`.
"""
_HEAD = "| field | default | allowed | on resume | meaning |\n| --- | --- | --- | --- | --- |"


def page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRODUCTION]
    for section, fields in groupby(config_fields().values(), key=lambda field: field.path.split(".")[0]):
        meaning = (RunConfig.model_fields[section].annotation.__doc__ or "").strip()
        parts += [f"## {section}\n\n{meaning}\n", _HEAD, *map(_row, fields), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def _row(field: ConfigField) -> str:
    on_resume = "may change" if field.may_change else ""
    cells = (f"`{field.path}`", f"`{default(field)}`", allowed(field), on_resume, field.info.description or "")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def default(field: ConfigField) -> str:
    """Its default as one line of YAML."""
    if field.info.default_factory is fast_dtype:
        return "bf16 or fp32"
    value = field.info.get_default(call_default_factory=True)
    style = '"' if isinstance(value, str) and "\n" in value else None
    return yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6).split("\n")[0]


def allowed(field: ConfigField) -> str:
    """Values it takes, as text."""
    return _allowed(field.info.annotation, field.info.metadata)


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _allowed(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_allowed(argument) for argument in arguments))
    if origin is Literal:
        return ", ".join(str(argument) for argument in arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"{{{', '.join(annotation.model_fields)}}}"
    if origin is list:
        return f"a list of {_allowed(arguments[0])}"
    if origin is dict:
        text = "text (true, false and numbers in quotes)" if arguments[1] is str else "values"
        return f"a mapping of names to {_allowed(arguments[1]) if get_origin(arguments[1]) is Annotated else text}"
    return _NAMES.get(annotation, str(annotation)) + "".join(map(_bounds, metadata))


def _bounds(item: Any) -> str:
    if getattr(item, "metadata", None):  # a pydantic Field inside Annotated
        return "".join(map(_bounds, item.metadata))
    found = [
        f" {word} {getattr(item, name):.12g}" for name, word in _BOUNDS.items() if getattr(item, name, None) is not None
    ]
    pattern = getattr(item, "pattern", None)
    return " and".join(found) + (f" matching `{pattern}`" if pattern else "")


if __name__ == "__main__":
    sys.stdout.write(page())
