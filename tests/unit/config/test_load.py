"""Loading of configurations: values, refusals, round trip, and every recipe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.config_page import allowed, default
from tc_ray.config.fields import config_fields
from tc_ray.config.load import dump_config, load_config, save_config
from tc_ray.config.schema import RunConfig
from tc_ray.config.yaml_file import ConfigError

RECIPES = sorted((Path(__file__).parents[3] / "tc_ray" / "recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_are_yaml_and_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "pilot:\n  learning_rate: 5e-5\n  epochs: 2\ncopilot:\n")
    config = load_config(
        path,
        [
            "pilot.learning_rate=1e-4",
            "copilot.layers=[4, 9]",
            "run.folder=null",
            "tracking.enabled=false",
            "data.embedded_task_options.max_terms=4",
        ],
    )
    assert config.pilot.learning_rate == 1e-4
    assert config.pilot.epochs == 2
    assert config.copilot.layers == [4, 9]
    assert config.tracking.enabled is False
    assert config.data.embedded_task_options == {"max_terms": 4}
    assert load_config(path).pilot.learning_rate == 5e-5  # YAML 1.1 alone reads text here


PAPER = {
    "output_tokens": "all",
    "producing_state": "unseen",
    "row_positions": False,
    "error_input": "free",
    "start_row": "zeros",
    "memory_norm": False,
    "scaled_output": False,
}


def form_of(config: RunConfig) -> dict[str, object]:
    return {name: getattr(config.copilot, name) for name in PAPER}


def test_a_preset_sets_what_is_not_set_beside_it(tmp_path: Path) -> None:
    """In a recipe, over a saved config that spells out every field, and with single fields beside it; saved, it is the same."""
    plain, paper = load_config(None), load_config(write(tmp_path, "copilot:\n  preset: paper\n"))
    assert form_of(paper) == PAPER and not set(PAPER.items()) & set(form_of(plain).items())
    assert (plain.log.top_k, paper.log.top_k) == (16, 256)
    assert form_of(load_config(tmp_path / "recipe.yaml", ["copilot.memory_norm=true"])) == PAPER | {"memory_norm": True}
    path = write(tmp_path, "copilot:\n  preset: paper\n  start_row: learned\nlog:\n  top_k: 9\n")
    kept = load_config(path)
    assert form_of(kept) == PAPER | {"start_row": "learned"} and kept.log.top_k == 9
    for config in (plain, paper, kept):
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        again = load_config(tmp_path / "saved.yaml", ["copilot.preset=paper", "copilot.error_input=embedding"])
        assert form_of(again) == PAPER | {"error_input": "embedding"}
        assert again.log.top_k == config.log.top_k, "a stored log has the errors that it has"
        assert form_of(load_config(tmp_path / "saved.yaml", ["copilot.preset=null"])) == form_of(plain)


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == RunConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("pilot:\n  lerning_rate: 1\n", [], ["recipe.yaml, line 2", "pilot.lerning_rate", "pilot.learning_rate"]),
        ("learning_rate: 1\n", [], ["line 1", "pilot.learning_rate", "copilot.learning_rate"]),
        ("data:\n  lam_grid: [0]\n", [], ["data.lam_grid", "fusion.lam_grid"]),
        ("", ["pilt.epochs=3"], ["override 'pilt.epochs=3'", "pilot"]),
        ("pilot:\n  epochs: three\n", [], ["line 2", "pilot.epochs", "'three'", "valid integer"]),
        ("pilot:\n  dtype: fp16\n", [], ["pilot.dtype", "'fp16'", "'bf16' or 'fp32'"]),
        ("", ["data.max_bad_fraction=2"], ["override", "data.max_bad_fraction", "less than or equal to 1"]),
        (
            "pilot:\n  batch_size: 2\nresources:\n  pilot_workers: 4\n",
            [],
            ["recipe.yaml", "at least resources.pilot_workers 4"],
        ),
        ("pilot: 3\n", [], ["line 1", "pilot", "section with the fields method, lora"]),
        ("", ["data.plain_template=x"], ["override", "data: plain_template must contain {prompt}"]),
        ("pilot:\n  epochs: 1\n  epochs: 2\n", [], ["line 3", "epochs", "line 2"]),
        ("pilot: [\n", [], ["not YAML"]),
        ("- 1\n", [], ["sections", "pilot"]),
        ("", ["pilot.epochs"], ["section.field=value"]),
        ("", ["pilot.epochs=1", "pilot.epochs.more=1"], ["pilot.epochs"]),
    ],
)
def test_refusals_are_readable(tmp_path: Path, text: str, overrides: list[str], expected: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert all(part in message for part in expected), message
    assert "pydantic" not in message


def test_all_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "pilot:\n  epoch: 1\nfusion:\n  lamda_grid: [0.0]\n"))
    assert "pilot.epochs" in str(caught.value) and "fusion.lam_grid" in str(caught.value)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(None, ["pilot.learning_rate=1e-5", "run.folder=/tmp/x", "copilot.layers=[1]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert "description" not in dump_config(config)


def test_data_path_from_current_folder_then_from_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(recipes, "data:\n  train: ../given/train.jsonl\n")
    assert load_config(path).data.train == "../given/train.jsonl"  # absent: kept as written
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "train.jsonl").touch()
    assert load_config(path).data.train == str(tmp_path / "given" / "train.jsonl")
    path = write(recipes, "data:\n  train: mine.jsonl\n")
    (recipes / "mine.jsonl").touch()
    assert load_config(path).data.train == str(recipes / "mine.jsonl")
    (tmp_path / "elsewhere" / "mine.jsonl").touch()
    assert load_config(path).data.train == str(tmp_path / "elsewhere" / "mine.jsonl")


def test_held_out_sets_may_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a path, a mapping of names to paths, or to what is particular to a set; from the recipe and the command line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "far").mkdir()
    for name in ("a.jsonl", "far/b.jsonl"):
        (tmp_path / name).touch()
    recipe = tmp_path / "far" / "r.yaml"
    recipe.write_text("data:\n  test:\n    one: a.jsonl\n    two: {file: b.jsonl, metric: choice, task: piqa}\n")
    data = load_config(recipe, []).data
    sets = data.held_out_sets("test")
    assert {name: (one.file, one.metric, one.task) for name, one in sets.items()} == {
        "one": (str(tmp_path / "a.jsonl"), None, None),
        "two": (str(tmp_path / "far" / "b.jsonl"), "choice", "piqa"),
    }
    save_config(load_config(recipe, []), tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", []).data == data
    assert load_config(None, ["data.test={x: a.jsonl}"]).data.held_out_sets("test")["x"].file.endswith("/a.jsonl")
    one_more = load_config(recipe, ["data.test.three=a.jsonl"]).data.held_out_sets("test")
    assert list(one_more) == ["one", "two", "three"]
    assert load_config(None, ["data.test=a.jsonl"]).data.held_out_sets("test")["test"].file.endswith("/a.jsonl")
    assert load_config(None, []).data.held_out_sets("validation") == {}
    for override in ("data.test={a/b: a.jsonl}", "data.test={x: {file: a.jsonl, taste: 1}}", "data.test={x: 3}"):
        with pytest.raises(ConfigError, match=r"data\.test"):
            load_config(None, [override])


def test_a_recipe_of_the_package_is_known_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").run.name == "demo"
    assert Path(load_config("t5-lastfm").model.pilot).is_dir(), (
        "a model folder beside the recipes is found from anywhere"
    )
    with pytest.raises(ConfigError, match=r"neither a file here nor a recipe of tc-ray; the recipes are demo, "):
        load_config("dmo")
    (tmp_path / "demo").write_text("run:\n  name: mine\n")
    assert load_config("demo").run.name == "mine", "a file goes before a recipe of that name"


@pytest.mark.parametrize(
    ("overrides", "fallback"),
    [
        ([], "embedded"),
        (["data.train=/given/train.jsonl"], None),
        (["data.test=/given/test.jsonl"], None),
        (["data.train=/given/train.jsonl", "data.fallback=embedded"], "embedded"),
        (["data.train=embedded"], "embedded"),
        (["data.test=null", "data.cutoff_tokens=64"], "embedded"),
    ],
)
def test_a_recipes_fallback_does_not_stand_in_for_files_of_the_command_line(
    tmp_path: Path, overrides: list[str], fallback: str | None
) -> None:
    """Fault 19: a path that the user gave and that was mistyped trained on the embedded puzzles."""
    path = write(tmp_path, "data:\n  train: recipe.jsonl\n  fallback: embedded\n")
    config = load_config(path, overrides)
    assert config.data.fallback == fallback
    saved = tmp_path / "saved.yaml"
    save_config(config, saved)
    assert load_config(saved).data == config.data, "a resume takes the same files"


def test_model_folder_beside_the_recipes_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    (recipes / "models" / "tiny").mkdir(parents=True)
    (recipes / "smollm2-135m-instruct").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(recipes, "model:\n  pilot: models/tiny\n  copilot: owner/model\n")
    model = load_config(path).model
    assert (model.pilot, model.copilot) == (str(recipes / "models" / "tiny"), "owner/model")
    builtin = load_config(path, ["model.pilot=smollm2-135m-instruct"]).model.pilot
    assert builtin == "smollm2-135m-instruct", "a builtin name is no path"


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("data.train=/tmp/a #b", "data.train", "/tmp/a #b"),
        ("data.train= /tmp/a: b ", "data.train", " /tmp/a: b "),
        ("data.plain_template={prompt}", "data.plain_template", "{prompt}"),
        ("data.completion_pattern=[0-9]+", "data.completion_pattern", "[0-9]+"),
        ("data.completion_pattern=null", "data.completion_pattern", None),
        ("data.system='quoted'", "data.system", "'quoted'"),
        ("data.system=", "data.system", ""),
        ("data.system=key: [x", "data.system", "key: [x"),
        ("run.name=001", "run.name", "001"),
        ("run.name=yes", "run.name", "yes"),
        ("run.name=null", "run.name", "null"),
        ("run.folder=/tmp/1e3 #x", "run.folder", Path("/tmp/1e3 #x")),
        ("run.folder=null", "run.folder", None),
        ("model.cache=2024", "model.cache", Path("2024")),
        ("data.embedded_task=on", "data.embedded_task", "on"),
        ("log.storage_options.aws_allow_http=true", "log.storage_options", {"aws_allow_http": "true"}),
        ("log.storage_options.aws_region=1e3 #", "log.storage_options", {"aws_region": "1e3 #"}),
        ("data.fallback=null", "data.fallback", None),
        ("data.embedded_task_options.max_terms=4", "data.embedded_task_options", {"max_terms": 4}),
        ("pilot.lora.target_modules=[q, v]", "pilot.lora.target_modules", ["q", "v"]),
        ("log.rationale=[1, 2]", "log.rationale", [1, 2]),
        ("log.top_k=8", "log.top_k", 8),
        ("tracking.enabled=off", "tracking.enabled", False),
    ],
)
def test_text_is_taken_as_typed_and_the_rest_is_yaml(override: str, field: str, expected: object) -> None:
    """Fault 21: YAML made a comment, a mapping, a list, a number or a truth value of what was meant as text."""
    section, name = field.split(".", 1)
    value: object = getattr(load_config(None, [override]), section)
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_an_empty_path_is_refused() -> None:
    """Fault 21: it would be the current folder."""
    for field, remedy in (
        ("run.folder", "write null"),
        ("data.train", "name a file"),
        ("data.test", "write null"),
        ("model.pilot", "name a file"),
    ):
        for blank in ("", " "):
            with pytest.raises(ConfigError, match=rf"{field}=.*the path is empty; {remedy}"):
                load_config(None, [f"{field}={blank}"])


def test_an_override_is_not_lost_to_a_later_one_of_its_section() -> None:
    """Fault 14, its kind: of two values for one setting the last was taken in silence."""
    with pytest.raises(ConfigError, match="override copilot replaces an earlier one"):
        load_config(None, ["copilot.every=2", "copilot={batch_size: 4}"])
    kept = load_config(None, ["copilot={batch_size: 4}", "copilot.every=2"]).copilot
    assert (kept.batch_size, kept.every) == (4, 2)


FLOATS = [field.path for field in config_fields().values() if "a number" in allowed(field)]


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, field: str, value: str) -> None:
    """Fault 21: an infinite learning rate and a lambda that is no number were taken."""
    keys = field.split(".")
    written = f"[0.0, {value}]" if field == "fusion.lam_grid" else value
    lines = "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys[:-1]))
    path = write(tmp_path, f"{lines}{'  ' * (len(keys) - 1)}{keys[-1]}: {written}\n")
    with pytest.raises(ConfigError, match=rf"recipe\.yaml, line {len(keys)}: {re.escape(field)} is .*(inf|nan)"):
        load_config(path)
    with pytest.raises(ConfigError, match=re.escape(field)):
        load_config(None, [f"{field}={written}"])


def test_there_are_numbers() -> None:
    assert {"pilot.learning_rate", "fusion.lam_grid", "data.validation_size", "log.vacuum_grace_seconds"} <= set(FLOATS)


def test_fields_are_described() -> None:
    fields = {field.path: field for field in config_fields().values()}
    assert allowed(fields["pilot.zero_stage"]) == "0, 1, 2, 3"
    assert default(fields["pilot.lora.rank"]) == "16"
    assert default(fields["copilot.lora.rank"]) == "32"
    assert allowed(fields["data.validation_size"]) == "a number above 0"
    assert allowed(fields["run.folder"]) == "a path or null"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.run.name == recipe.stem


def test_there_are_recipes() -> None:
    assert {"demo", "smollm2-mawps", "smollm2-svamp"} <= {path.stem for path in RECIPES}


def test_config_imports_neither_torch_nor_ray() -> None:
    code = "import sys, tc_ray.config.load; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_rows_are_cut_by_a_seed_of_their_own() -> None:
    assert load_config(None, ["run.seed=3"]).data_seed == 3
    assert load_config(None, ["run.seed=3", "data.seed=0"]).data_seed == 0
