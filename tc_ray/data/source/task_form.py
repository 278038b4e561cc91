"""Forms of known tasks: how a record becomes prompt, completion, options and answer, and by what it is measured.

A form is a YAML file of `recipes/tasks`, or one of the user. Invariant: a bad form is refused with file and field, before any
data file is read. `data.source.tasks` applies it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator

from tc_ray.config.section import Metric, Section
from tc_ray.config.yaml_file import RECIPES, ConfigError, read_sections

TASKS = RECIPES / "tasks"


class TaskForm(Section):
    """A task. Texts may name fields of the record, as Python's `str.format` does: {question}, {choices[text][0]}.

    A record that has a prompt already (messages, prompt, instruction) keeps its prompt, completion and answer, and gets options.
    """

    metric: Metric = Field(description="what its rows are measured by")
    prompt: str = Field("{prompt}", description="text of the prompt")
    answer: str = Field("{answer}", description="text of the answer")
    answer_pattern: str | None = Field(
        None, description="regular expression whose last group, in `answer`, is the answer"
    )
    names: dict[str, str] = Field(
        default_factory=dict, description="what answers are called here, by what the record says"
    )
    completion: str = Field(
        "{answer}",
        description="what is learned, and how options are written; {answer} is the answer, {given} the text it is in",
    )
    options: list[str] = Field(default_factory=list, description="answers to choose from (metric: choice)")
    choose_option_by: Literal["sum", "token", "character"] = Field("sum", description="as fusion.choose_option_by")

    @field_validator("options")
    @classmethod
    def _more_than_one(cls, options: list[str]) -> list[str]:
        if options and len(set(options)) < max(2, len(options)):
            raise ValueError("give at least two different options")
        return options


def load_task(name: str) -> TaskForm:
    """The form in `recipes/tasks/NAME.yaml`, or in the YAML file `name`. Raises ConfigError that names file and field."""
    file = Path(name).expanduser()
    if not file.is_file():
        file = TASKS / f"{name}.yaml"
        if not file.is_file() or file.parent != TASKS:
            known = ", ".join(sorted(task.stem for task in TASKS.glob("*.yaml")))
            raise ConfigError(f"task {name} is neither a file nor one of tc-ray's; these are {known}")
    origins: dict[tuple[str, ...], str] = {}
    values = read_sections(file, origins)
    try:
        return TaskForm.model_validate({key: value for key, value in values.items() if value != {}})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        path = tuple(map(str, problem["loc"]))
        raise ConfigError(f"{origins.get(path[:1], file)}: {'.'.join(path)}: {problem['msg']}") from None
