"""Functions named by a config: what is found, what is refused, with field and what was there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tc_ray.config.load import load_config
from tc_ray.config.named import check_named, load_named, named_in, source_hash
from tc_ray.config.yaml_file import ConfigError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules of the user; what is imported from it is forgotten."""
    (tmp_path / "own_functions.py").write_text("LIMIT = 3\ndef f1(said, row):\n    return 1.0\n")
    (tmp_path / "own_broken.py").write_text("import no_such_package\n")
    (tmp_path / "own_failing.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]


def test_a_function_of_the_working_directory_is_found(here: Path) -> None:
    assert load_named("own_functions:f1", "fusion.metric")("", None) == 1.0
    before = source_hash("own_functions:f1", "fusion.metric")
    (here / "own_functions.py").write_text("def f1(said, row):\n    return 2.0\n")
    assert source_hash("own_functions:f1", "fusion.metric") != before


def test_the_source_of_a_partial_is_the_users(here: Path) -> None:
    """Of the module that is named, which has its arguments, and of the function inside it."""
    (here / "own_partial.py").write_text(
        "import own_functions\nfrom functools import partial\nf2 = partial(own_functions.f1, 1)\n"
    )
    hashes = {source_hash("own_partial:f2", "fusion.metric")}
    for name in ("own_partial.py", "own_functions.py"):
        (here / name).write_text((here / name).read_text() + "# changed\n")
        hashes.add(source_hash("own_partial:f2", "fusion.metric"))
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("own_nothing:f", "there is no module own_nothing in the working directory"),
        ("own_functions.deeper:f", "importing own_functions.deeper failed|there is no module own_functions.deeper"),
        ("own_functions:g", r"own_functions\.py has no g; its functions are f1"),
        ("own_functions:LIMIT", r"has LIMIT, which is no function; its functions are f1"),
        ("own_broken:f", "importing own_broken failed: No module named 'no_such_package'"),
        ("own_failing:f", "importing own_failing failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_wrong_name_is_refused_with_field_and_what_was_found(name: str, found: str) -> None:
    with pytest.raises(ConfigError, match=rf"callbacks\.on_round is {name}: .*({found})"):
        check_named(load_config(None, [f"callbacks.on_round={name}"]))


@pytest.mark.parametrize(
    "value", ["f1", "own_functions.f1", "own-functions:f1", "own_functions:", "a:b:c", "os:path/x"]
)
def test_what_is_no_name_is_refused_as_it_is_read(value: str) -> None:
    for field, advice in (("data.convert", "write module:function"), ("fusion.metric", "one of exact_match, choice")):
        with pytest.raises(ConfigError, match=rf"override {field}: {field} is .*{advice}|{field} is .*{advice}"):
            load_config(None, [f"{field}={value}"])


def test_every_field_that_names_a_function_is_checked() -> None:
    config = load_config(
        None,
        [
            "fusion.metric=own_functions:f1",
            "data.convert=own_functions:f1",
            "callbacks.on_evaluation=own_functions:f1",
            "data.test={svamp: {file: rows.jsonl, metric: own_functions:g}, other: {file: rows.jsonl, metric: nll}}",
        ],
    )
    assert dict(named_in(config)) == {
        "fusion.metric": "own_functions:f1",
        "data.convert": "own_functions:f1",
        "callbacks.on_evaluation": "own_functions:f1",
        "data.test.svamp.metric": "own_functions:g",
    }
    with pytest.raises(ConfigError, match=r"data\.test\.svamp\.metric is own_functions:g: .* has no g"):
        check_named(config)


@pytest.mark.parametrize("given", [["pilot.patience=2"], ["pilot.final=best"]])
def test_an_end_by_validation_needs_validations(given: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"set validate_every to the rounds between two"):
        load_config(None, given)
    load_config(None, [*given, "pilot.validate_every=5"])
