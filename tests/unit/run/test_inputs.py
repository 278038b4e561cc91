"""What a run starts from, by content: hashes of rows and weights, where they are kept, and what differs from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_ray.copilot import checkpoint
from tc_ray.copilot.checkpoint import Position
from tc_ray.data.encode import encode
from tc_ray.data.prepared import prepare
from tc_ray.data.prepared.folder import SCHEMA, rows_hashes
from tc_ray.mistakelog.table.location import Location
from tc_ray.mistakelog.table.store import LogStore
from tc_ray.models.identity import ModelSourceError, weights_hash
from tc_ray.pilot.checkpoint import mark_complete
from tc_ray.run.inputs import OtherInputsError, base_weights, check_inputs, prepare_rows, recorded_inputs
from tests.support.data_writers import SUMS, lines
from tests.support.mistakelog_samples import metadata
from tests.support.tiny_model import make_tiny_llama, make_tokenizer
from tests.support.tiny_run import tiny_config

INPUTS = {
    "train_rows": "aa",
    "validation_rows": "bb",
    "test_rows": "cc",
    "pilot_weights": "dd",
    "copilot_weights": "ee",
}


def rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": number,
            "input_ids": list(range(number % 7 + 2)),
            "target_start": 1,
            "prompt": f"p{number}",
            "completion": "c",
            "answer": None if number % 2 else "a",
        }
        for number in range(count)
    ]


def write(folder: Path, table: list[dict[str, Any]], **options: Any) -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    for part in ("train", "validation", "test"):
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), folder / f"{part}.parquet", **options)
    return rows_hashes(folder)


def test_rows_are_known_by_their_content(tmp_path: Path) -> None:
    """Fault 2: neither the files' bytes nor their times count; rows, order and held-out text do."""
    first = write(tmp_path / "a", rows())
    other_bytes = write(tmp_path / "b", rows(), row_group_size=7, compression="zstd", use_dictionary=False)
    assert (tmp_path / "a" / "train.parquet").read_bytes() != (tmp_path / "b" / "train.parquet").read_bytes()
    assert first == other_bytes
    changed = rows()
    changed[3]["input_ids"] = [9, *changed[3]["input_ids"][1:]]
    assert write(tmp_path / "c", changed)["train"] != first["train"]
    assert write(tmp_path / "d", rows()[::-1])["train"] != first["train"]
    assert write(tmp_path / "e", rows()[:-1])["train"] != first["train"]
    shifted = rows()  # the same ids in a row, divided elsewhere
    shifted[0]["input_ids"], shifted[1]["input_ids"] = [0, 1, 0], [1, 2]
    assert write(tmp_path / "f", shifted)["train"] != first["train"]
    text = rows()
    text[0]["answer"] = "b"
    hashes = write(tmp_path / "g", text)
    assert hashes["test"] != first["test"] and hashes["validation"] != first["validation"]


def test_weights_are_known_by_their_content(tmp_path: Path) -> None:
    """Fault 2: one bit of one tensor, or the config, counts; the division into files and their times do not."""
    model = make_tiny_llama(tmp_path / "model")
    first = weights_hash(model)
    weights = load_file(model / "model.safetensors")
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:5]}, model / "model-1.safetensors", {"made": "elsewhere"})
    save_file({name: weights[name] for name in names[5:]}, model / "model-2.safetensors")
    (model / "model.safetensors").unlink()
    os.utime(model / "config.json", (0, 0))
    assert weights_hash(model) == first
    weights[names[-1]].view(torch.int32).flatten()[-1:].bitwise_xor_(1)
    save_file({name: weights[name] for name in names[5:]}, model / "model-2.safetensors")
    changed = weights_hash(model)
    assert changed != first
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_hash(model) != changed
    drawn = weights_hash(model, random_weights=True)
    (model / "model-2.safetensors").write_bytes((model / "model-2.safetensors").read_bytes()[:-9])
    assert weights_hash(model, random_weights=True) == drawn
    with pytest.raises(ModelSourceError, match=r"model-2\.safetensors is damaged"):
        weights_hash(model)


def test_weights_of_any_name_count(tmp_path: Path) -> None:
    """A fault found by attack: shards that only an index names, and adapters beside the config, were not hashed."""
    model = make_tiny_llama(tmp_path / "model")
    first = weights_hash(model)
    weights = load_file(model / "model.safetensors")
    for name in ("adapter_model", "consolidated", "consolidated-00001-of-00001"):
        save_file({"a": torch.ones(2)}, model / f"{name}.safetensors")
        found = weights_hash(model)
        assert (found == first) == name.startswith("consolidated"), name
        (model / f"{name}.safetensors").unlink()
    (model / "model.safetensors").rename(shard := model / "part-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, shard.name)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_hash(model) == first
    save_file({name: tensor + 1 for name, tensor in weights.items()}, shard)
    assert weights_hash(model) != first


def test_inputs_are_kept_in_log_and_checkpoints(tmp_path: Path) -> None:
    """Fault 2: with the log off too, from the checkpoints."""
    config = tiny_config(tmp_path)
    run, log = config.run.path, Location(config.log_location)
    assert recorded_inputs(config, run, log) == []
    (folder := run / "pilot" / "checkpoints" / "round-000005").mkdir(parents=True)
    mark_complete(folder, round_number=5, world_size=1, zero_stage=1, keep=2, inputs=INPUTS)

    class Stub:
        def save(self, folder: Path) -> None:
            (folder / "x").touch()

    checkpoint.save(Stub(), run / "copilot" / "checkpoints", Position(10, 4, 3, INPUTS))  # type: ignore[arg-type]
    LogStore.create(log, metadata(**INPUTS))
    found = recorded_inputs(config, run, log)
    assert [(dict(one.inputs), one.round) for one in found] == [(INPUTS, 0), (INPUTS, 5), (INPUTS, 4)]
    config.log.enabled = False
    assert [one.round for one in recorded_inputs(config, run, log)] == [5, 4]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "train_rows",
            "the training rows differ (data.train=embedded, read from here; tokenizer and template count too)",
        ),
        ("validation_rows", "the validation rows differ (data.validation=cut from data.train)"),
        ("test_rows", "the test rows differ"),
        ("pilot_weights", "the base weights differ (model.pilot="),
        ("copilot_weights", "the Copilot's base weights differ (model.copilot="),
    ],
)
def test_each_difference_is_named(tmp_path: Path, name: str, words: str) -> None:
    """Fault 2: refused by name, with the rounds that would have other inputs and what to do."""
    config = tiny_config(tmp_path)
    (folder := config.run.path / "pilot" / "checkpoints" / "round-000005").mkdir(parents=True)
    mark_complete(folder, round_number=5, world_size=1, zero_stage=1, keep=2, inputs=INPUTS)
    recorded = recorded_inputs(config, config.run.path, Location(config.log_location))
    check_inputs(config, recorded, INPUTS)
    with pytest.raises(OtherInputsError) as caught:
        check_inputs(config, recorded, INPUTS | {name: "ff"}, now="here")
    for part in (words, "ff now", "rounds 1 to 5", "Restore them", "another run.folder"):
        assert part in str(caught.value)


def test_another_base_of_the_copilot_is_another_hash(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    other = make_tiny_llama(tmp_path / "other", seed=1)
    same = base_weights(config, Path(config.model.pilot), Path(config.model.pilot))
    assert same["pilot_weights"] == same["copilot_weights"]
    assert base_weights(config, Path(config.model.pilot), other)["copilot_weights"] == weights_hash(other)


def test_files_of_a_user_in_the_data_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault found by attack: a start put a new folder in place of data/, in which data.train and an evaluation's rows lay."""
    monkeypatch.setattr(encode, "_in_ray", lambda encode_one, files: [encode_one(file) for file in files])
    monkeypatch.setattr(prepare, "cpus", lambda: 1)
    data = tmp_path / "run" / "data"
    own = lines(data / "mine.jsonl", SUMS)
    (evaluated := data / "evaluation-more-test.jsonl").mkdir()
    (evaluated / "test.parquet").touch()
    (data / "train.parquet").write_bytes(b"of an earlier start")
    config = tiny_config(tmp_path, data__train=str(own), data__validation_size=6, data__test_size=6)
    for _ in range(2):
        made, _ = prepare_rows(config, make_tokenizer(), [], encoder_decoder=False, vocab_size=258)
        assert own.exists() and (evaluated / "test.parquet").exists()
        assert pq.read_table(made.file("train")).num_rows == 52 and made.folder == data
        assert not (tmp_path / "run" / "data.new").exists()
