"""`${NAME}` in the values of recipes, studies and Serve config files, and texts that look like numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tc_ray.config.load import (
    Layer,
    dump_config,
    load_config,
    load_saved_config,
    load_serving,
    save_config,
)
from tc_ray.config.redact import redact
from tc_ray.config.yaml_file import ConfigError
from tc_ray.study.file import load_study
from tests.support.study_samples import write_study

SECRET = "kHq93-never-seen-Zx"


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_value_of_the_environment_is_read_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text fields take it to the letter, others as YAML, in lists and mappings and beside other text too."""
    for name, value in {"NAME": "2024", "LR": "1e-4", "LAYERS": "[1, 3]", "BUCKET": "s3://b", "EMPTY": ""}.items():
        monkeypatch.setenv(f"T_{name}", value)
    monkeypatch.delenv("T_NONE", raising=False)
    config = load_config(
        recipe(
            tmp_path,
            """
run: {name: "${T_NAME}"}
pilot:
  learning_rate: ${T_LR}
  epochs: ${T_NONE:-3}
  batch_size: ${T_EMPTY:-16}
copilot:
  layers: ${T_LAYERS}
log:
  path: ${T_BUCKET}/log-${T_NAME}
  storage_options: {aws_region: "${T_NAME}"}
fusion:
  lam_grid: [0.0, "${T_NONE:-0.5}"]
data:
  system: pay $5, $${T_NAME} or ${{price}}
  test: {a: "${T_BUCKET}/a.jsonl", b: {file: "${T_BUCKET}/b.jsonl", metric: "${T_NONE:-nll}"}}
  validation: ${T_NONE:-null}
""",
        )
    )
    assert (config.run.name, config.log.path, config.log.storage_options) == (
        "2024",
        "s3://b/log-2024",
        {"aws_region": "2024"},
    )
    assert (config.pilot.learning_rate, config.pilot.epochs, config.pilot.batch_size) == (1e-4, 3, 16)
    assert config.copilot.layers == [1, 3] and config.fusion.lam_grid == [0.0, 0.5]
    assert config.data.system == "pay $5, ${T_NAME} or ${{price}}"
    sets = config.data.held_out_sets("test")
    assert (sets["a"].file, sets["b"].file, sets["b"].metric) == ("s3://b/a.jsonl", "s3://b/b.jsonl", "nll")
    assert config.data.validation is None
    assert load_config(None, ["data.system=${T_NAME}"]).data.system == "${T_NAME}", "a shell expands the command line"


def test_entries_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROWS": "s3://b/rows", "WEIGHT": "2", "FILE": "2024"}.items():
        monkeypatch.setenv(f"T_{name}", value)
    train = "['${T_ROWS}/a.jsonl', {file: '${T_FILE}', weight: '${T_WEIGHT}'}, {file: '${T_NONE:-c}', weight: 0.5}]"
    found = load_config(recipe(tmp_path, f"data:\n  train: {train}\n")).data.train_sources()
    assert [(one.file, one.weight) for one in found] == [("s3://b/rows/a.jsonl", 1), ("2024", 2), ("c", 0.5)]
    for entry, message in (
        ("{file: '${T_GONE}'}", r"line 2: data\.train\.file needs the environment variable T_GONE"),
        ("{file: '${T_GONE:-}'}", r"data\.train.* 0\.file: String should have at least 1 character"),
        ("'${T_GONE:-}'", r"line 2: data\.train.*: the path is empty"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(recipe(tmp_path, f"data:\n  train: [{entry}]\n"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("${T_NONE}/log", r"recipe\.yaml, line 3: log\.path needs the environment variable T_NONE, which is not set"),
        ("${T_NONE", r"recipe\.yaml, line 3: log\.path has \$\{ without a name and \}"),
        ("${T_NONE:?x}", r"line 3: log\.path has \$\{ without"),
        ("${ T_NONE }", r"line 3: log\.path has \$\{ without"),
    ],
)
def test_a_reference_that_cannot_be_followed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    monkeypatch.delenv("T_NONE", raising=False)
    with pytest.raises(ConfigError, match=message):
        load_config(recipe(tmp_path, f"log:\n  top_k: 4\n  path: '{value}'\n"))


def test_a_value_of_the_wrong_kind_names_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_EPOCHS", "three")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 2: pilot\.epochs is 'three'"):
        load_config(recipe(tmp_path, "pilot:\n  epochs: ${T_EPOCHS}\n"))
    monkeypatch.setenv("T_EPOCHS", "[1")
    with pytest.raises(ConfigError, match=r"line 2: pilot\.epochs, with T_EPOCHS from the environment,: not a YAML"):
        load_config(recipe(tmp_path, "pilot:\n  epochs: ${T_EPOCHS}\n"))


def test_secrets_of_the_environment_are_struck_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is saved, in messages about wrong values, and in any text where the variable's name says what it is."""
    monkeypatch.setenv("T_PLAIN", SECRET)
    monkeypatch.setenv("T_API_TOKEN", SECRET + "-token")
    text = "log:\n  storage_options: {aws_secret_access_key: '${T_PLAIN}'}\ntracking:\n  uri: http://u:${T_PLAIN}@h\n"
    config = load_config(recipe(tmp_path, text))
    assert config.log.storage_options == {"aws_secret_access_key": SECRET}
    assert config.tracking.uri == f"http://u:{SECRET}@h"
    saved = dump_config(config)
    assert SECRET not in saved and "T_PLAIN" not in saved and "'***'" in saved and "http://***@h" in saved
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(tmp_path, "pilot:\n  epochs: ${T_API_TOKEN}\n"))
    assert SECRET not in str(caught.value) and "line 2: pilot.epochs is '***'" in str(caught.value)
    assert redact(f"signed with {SECRET}-token") == "signed with ***"
    text = "tracking:\n  uri: http://h/${T_API_TOKEN}/f\ndata:\n  train: s3://b/${T_API_TOKEN}/rows\n"
    saved = dump_config(load_config(recipe(tmp_path, text)))
    assert SECRET not in saved and "http://h/***/f" in saved and "s3://b/***/rows" in saved
    folder = f"/runs/{SECRET}-token"
    assert f"folder: {folder}\n" in dump_config(load_config(None, [f"run.folder={folder}"])), "a path is read again"
    assert "x?token=***" in dump_config(load_config(None, ["data.train=h/x?token=abc"]))


def test_a_path_in_a_variable_that_is_named_like_a_secret_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("T_API_KEY_FILE", str(tmp_path / "keys-of-all.txt"))
    config = load_config(recipe(tmp_path, "serving:\n  key_file: ${T_API_KEY_FILE}\n"))
    assert str(config.serving.key_file) == str(tmp_path / "keys-of-all.txt")
    assert redact(f"{tmp_path}/keys-of-all.txt") == f"{tmp_path}/keys-of-all.txt"


def test_a_saved_configuration_is_read_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder may come from anybody: its config could send a secret of the environment elsewhere."""
    monkeypatch.setenv("T_PLAIN", SECRET)
    config = load_config(None, ["data.system=${T_PLAIN} and $${x}", "tracking.uri=http://h/${T_PLAIN}", "run.name=1e5"])
    save_config(config, tmp_path / "config.yaml")
    assert load_saved_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml") == config


def test_texts_that_look_like_numbers_survive_saving(tmp_path: Path) -> None:
    """PyYAML wrote 1e5 without quotes, as it reads text there; this project's loader reads a number."""
    for text in ("1e5", "1e-4", "12", "null", "true", "0x1f", "2024-01-01", "1_000"):
        config = load_config(None, [f"data.embedded_task={text}"])
        save_config(config, tmp_path / "config.yaml")
        assert load_saved_config(tmp_path / "config.yaml").data.embedded_task == text


def test_numbers_with_an_exponent_are_numbers_everywhere(tmp_path: Path) -> None:
    for text in ("1e-4", "1E-4", "1.0e-4", "+1e-4", ".1e-3", "1.e-4"):
        assert load_config(recipe(tmp_path, f"pilot:\n  learning_rate: {text}\n")).pilot.learning_rate == 1e-4
        assert load_config(None, [f"pilot.learning_rate={text}"]).pilot.learning_rate == 1e-4


def test_references_that_are_replaced_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("T_NONE", raising=False)
    path = recipe(tmp_path, "log:\n  path: ${T_NONE}\npilot:\n  epochs: ${T_NONE}\n")
    layer = Layer({"pilot.epochs": "${T_NONE}", "log.top_k": 4}, {"pilot.epochs": "x", "log.top_k": "x"}, tmp_path)
    config = load_config(path, ["log.path=/x", "pilot.epochs=2"], [layer])
    assert (config.log.path, config.log.top_k, config.pilot.epochs) == ("/x", 4, 2)


def test_layers_and_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("T_PORT", "8123")
    layer = Layer({"serving.port": "${T_PORT}"}, {"serving.port": "study.yaml, line 4"}, tmp_path)
    assert load_config(None, layers=[layer]).serving.port == 8123
    path = recipe(tmp_path, "pilot:\n  epochs: ${T_NONE}\nserving:\n  port: ${T_PORT}\n")
    assert load_serving(path).port == 8123, "a server does not look at the other sections"
    assert load_serving(None, fields={"port": "${T_PORT}"}).port == 8123
    monkeypatch.delenv("T_PORT")
    with pytest.raises(ConfigError, match=r"study\.yaml, line 4: serving\.port needs .* T_PORT"):
        load_config(None, layers=[layer])


def test_a_studys_own_fields_and_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_study(tmp_path, folder="${T_SCRATCH}/study", tasks={"sums": {"pilot.epochs": "${T_EPOCHS:-2}"}})
    monkeypatch.delenv("T_SCRATCH", raising=False)
    with pytest.raises(ConfigError, match=r"line \d+: folder needs the environment variable T_SCRATCH"):
        load_study(file)
    monkeypatch.setenv("T_SCRATCH", str(tmp_path / "scratch"))
    study = load_study(file)
    assert study.folder == tmp_path / "scratch" / "study"
    assert study.config("sums", 1).pilot.epochs == 2
