"""The plan against the real thing: a log that is really written, rows that are really cut, and nothing started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tc_ray.config.load import load_config
from tc_ray.config.schema import RunConfig
from tc_ray.data.encode.encode import Encoder
from tc_ray.data.source.readers import iter_records
from tc_ray.models.families import UnknownFamilyError
from tc_ray.models.identity import ModelSourceError
from tc_ray.models.pilot.load import load_pilot
from tc_ray.run.plan.data_estimate import estimate
from tc_ray.run.plan.plan import make_plan
from tc_ray.run.state import JobError
from tests.support.command_line import tc_ray
from tests.support.family_samples import folder_of
from tests.support.plan_samples import BATCH, ROWS, config_of
from tests.support.tiny_families import ENCODER_DECODER

ROOT = Path(__file__).resolve().parents[3]


def test_heads_of_encoder_decoders_are_counted_as_they_are_saved(data: Path, tmp_path: Path) -> None:
    """mT5 and FLAN-T5 have heads of their own, of which neither config speaks once it was read."""
    model = load_pilot(folder_of("mt5"), dtype=torch.float32)
    tied = sum(p.numel() for p in model.parameters())
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "own")
    AutoTokenizer.from_pretrained(folder_of("mt5")).save_pretrained(tmp_path / "own")
    bare = tmp_path / "bare"
    shutil.copytree(tmp_path / "own", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    published = json.loads((bare / "config.json").read_text()) | {"tie_word_embeddings": False}
    (bare / "config.json").write_text(json.dumps(published))
    found = []
    for folder in (folder_of("mt5"), tmp_path / "own", bare):
        log = {"positions": "target"}
        sizes = make_plan(config_of(folder, str(data), tmp_path / "run", log=log, copilot={"layers": None})).sizes
        assert sizes is not None
        found.append(sizes.pilot - tied)
    assert found == [0, 258 * 32, 258 * 32]
    assert sum(p.numel() for p in load_pilot(tmp_path / "own", dtype=torch.float32).parameters()) == tied + 258 * 32


def write_prepared(config: RunConfig, data: Path, encoder_decoder: bool) -> None:
    """The training rows of a run of `config`, as far as a Copilot's output reads them."""
    folder = config.run.path / "data"
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(config.model.pilot)
    encoder = Encoder(config.data, tokenizer, config.run.seed, encoder_decoder)
    rows = [encoder.rows(record, held_out=False)[0] for record in iter_records(data)]
    columns = {
        "sample_id": pa.array(range(len(rows)), pa.int64()),
        "input_ids": pa.array([row["input_ids"] for row in rows], pa.list_(pa.int32())),
        "target_start": pa.array([row["target_start"] for row in rows], pa.int32()),
        "earlier_targets": pa.nulls(len(rows), pa.list_(pa.int32())),
    }
    pq.write_table(pa.table(columns), folder / "train.parquet")


def test_numbers_of_a_run(tiny: Path, data: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(tiny, str(data), tmp_path / "run", pilot={"epochs": 3}))
    assert plan.data is not None and plan.sizes is not None
    assert plan.data.rows == ROWS - 12 - 8
    assert plan.data.sampled == ROWS
    assert plan.rounds == 3 * 76 // BATCH
    assert plan.copilot_steps == 3 * plan.rounds
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert plan.sizes.pilot == plan.sizes.pilot_trainable == sum(p.numel() for p in model.parameters())
    text = str(plan)
    for words in (
        "76 training rows",
        f"{BATCH} examples per round, 1 worker(s) x 2 pass(es) of up to 4",
        "layers 1, 3 of",
        "free disk",
    ):
        assert words in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "base", "copilot", "method"),
    [
        ("llama", "pilot", {"layers": [1, 3]}, "lora"),
        ("llama", "pilot", {"layers": [1, 3]}, "full"),
        ("llama", "narrow", {"output_tokens": "all", "pattern": "late"}, "lora"),
        ("gemma3", "narrow", {"layers": [0, 2], "producing_state": "memory"}, "lora"),
        ("llama", "narrow", {"preset": "paper"}, "lora"),
        ("t5", "pilot", {"preset": "paper", "layers": [0, 2]}, "full"),
        ("t5", "pilot", {"layers": [0, 2]}, "lora"),
        ("flan_t5", "narrow", {"output_tokens": "all"}, "lora"),
        ("flan_t5", "narrow", {"output_tokens": "all"}, "full"),
    ],
)
def test_sizes_are_those_of_the_models_that_are_trained(
    data: Path, tmp_path: Path, family: str, base: str, copilot: dict[str, Any], method: str
) -> None:
    from tc_ray.copilot.learner import make_learner
    from tc_ray.copilot.worker import output_ids_of
    from tc_ray.models.pilot.load import add_adapters

    decoder_only = family not in ENCODER_DECODER
    pilot_folder, base_folder = folder_of(family), folder_of(family, base)
    config = config_of(
        pilot_folder,
        str(data),
        tmp_path / "run",
        model={"copilot": str(base_folder)},
        pilot={"method": method, "lora": {"rank": 2, "first_layer": 2 if decoder_only else 0}},
        copilot={"layers": None, "method": method, "lora": {"rank": 2}} | copilot,
        log={"positions": "all" if decoder_only else "target"},
    )
    write_prepared(config, data, not decoder_only)
    sizes = make_plan(config).sizes
    assert sizes is not None and sizes.encoder_decoder is not decoder_only
    pilot = add_adapters(load_pilot(pilot_folder, dtype=torch.float32), config.pilot)
    assert sizes.pilot_trainable == sum(p.numel() for p in pilot.parameters() if p.requires_grad)
    assert sizes.pilot == sum(p.numel() for name, p in pilot.named_parameters() if "lora_" not in name)
    learner = make_learner(config, pilot_folder, base_folder, output_ids_of(config), total_steps=1)
    built = learner.copilot
    assert sizes.copilot == sum(p.numel() for name, p in built.named_parameters() if "lora_" not in name)
    assert (sizes.copilot_layers, sizes.copilot_hidden_size) == (len(built.layers), 32 if base == "pilot" else 24)
    assert sizes.copilot_trainable == sum(p.numel() for p in learner.parameters.values())


def test_the_sample_obeys_pattern_cutoff_and_bad_rows(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    good = [json.dumps({"prompt": f"p{i}", "completion": "x = 1+1\nThe answer is 2"}) for i in range(60)]
    lines = good + ["{broken"] * 20 + [json.dumps({"prompt": "long " * 99, "completion": "y"})] * 20
    file.write_text("\n".join(lines))
    section = config_of(tiny, str(file), tmp_path / "run").data
    section.completion_pattern = r"x = [^\n]*"
    section.cutoff_tokens = 64
    section.max_bad_fraction = 0.5
    found = estimate(section, AutoTokenizer.from_pretrained(tiny), sample_rows=100, seed=0)
    assert found is not None
    assert found.rows == 60 - 8 - 8
    assert found.sampled == 60
    assert found.mean_target_tokens == len("x = 1+1") + 1
    assert found.target_ids == len(set("x = 1+1")) + 1


def test_a_sample_of_many_rows_is_near_the_whole(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "sorted.jsonl"  # sorted by length: the first rows would mislead
    file.write_text("".join(json.dumps({"prompt": "a" * (1 + i // 20), "completion": "b"}) + "\n" for i in range(2000)))
    section = config_of(tiny, str(file), tmp_path / "run").data
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    whole = estimate(section, tokenizer, sample_rows=10**6, seed=0)
    part = estimate(section, tokenizer, sample_rows=400, seed=0)
    assert whole is not None and part is not None
    assert part.sampled == 400 and part.rows == whole.rows
    assert part.mean_tokens == pytest.approx(whole.mean_tokens, rel=0.1)


def test_embedded_data_and_fallback(tiny: Path, tmp_path: Path) -> None:
    embedded = {"embedded_rows": 1000, "validation_size": 100, "test_size": 100}
    plan = make_plan(config_of(tiny, "embedded", tmp_path / "run", data=embedded))
    assert plan.data is not None and plan.data.rows == 800 and "data       embedded" in str(plan)
    absent = make_plan(
        config_of(tiny, str(tmp_path / "no.jsonl"), tmp_path / "run", data=embedded | {"fallback": "embedded"})
    )
    assert absent.data is not None and absent.data.rows == 800
    assert "is absent: using the embedded data set" in str(absent)
    unknown = make_plan(config_of(tiny, str(tmp_path / "no.jsonl"), tmp_path / "run"))
    assert unknown.data is None and unknown.log_bytes is None
    assert "refused    data.train" in str(unknown) and "unknown training rows" in str(unknown)


def test_what_no_run_could_start_with_is_refused(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="does not exist"):
        make_plan(config_of(tmp_path / "nowhere", str(data), tmp_path / "run"))
    with pytest.raises(ValueError, match=r"copilot.layers \[4\] are not layers"):
        make_plan(config_of(tiny, str(data), tmp_path / "run", copilot={"layers": [3, 4]}))
    plan = make_plan(config_of(tiny, str(tiny / "model.safetensors"), tmp_path / "run"))
    assert plan.data is None and "unknown kind of file" in plan.refusals[0]
    with pytest.raises(ValueError, match="has none that attends to the Pilot under pattern 'alternate'"):
        make_plan(config_of(tiny, str(data), tmp_path / "run", copilot={"layers": [3]}))
    with pytest.raises(ValueError, match=r"is encoder-decoder, the Pilot is decoder-only: .*\(model.copilot\)"):
        make_plan(config_of(tiny, str(data), tmp_path / "run", model={"copilot": str(folder_of("t5"))}))
    with pytest.raises(JobError, match=r"states of target positions only; set log.positions=target"):
        make_plan(config_of(folder_of("t5"), str(data), tmp_path / "run"))
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(UnknownFamilyError, match="'opt' has no adapter"):
        make_plan(config_of(tmp_path / "opt", str(data), tmp_path / "run"))


def test_a_log_that_does_not_fit_is_told(tiny: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny, str(data), tmp_path / "run", pilot={"epochs": 10**9})
    assert "does not fit on the disk" in str(make_plan(config))
    config.log.max_bytes = 10**6  # then old rounds go
    assert "does not fit on the disk" not in str(make_plan(config))


def test_plain_fine_tuning_has_no_log(tiny: Path, data: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(tiny, str(data), tmp_path / "run", log={"enabled": False}))
    assert plan.log_bytes is None and plan.copilot_steps is None
    assert "none: log.enabled is false" in str(plan) and "asks for 1 CPU\n" in str(plan)


def test_builtin_model_is_not_fetched_for_a_plan(tmp_path: Path) -> None:
    config = RunConfig.model_validate({"run": {"folder": tmp_path / "run"}, "model": {"cache": tmp_path / "cache"}})
    plan = make_plan(config)
    assert plan.sizes is None and "the first run fetches it" in str(plan)
    assert not (tmp_path / "cache").exists()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tc-ray` in a process of its own that tells at its end whether it imported Ray."""
    code = "import atexit, sys; atexit.register(lambda: print('ray' in sys.modules)); from tc_ray.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_command_prints_the_plan_and_starts_nothing(tiny: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command(
        "train", "smollm2-svamp", f"model.pilot={tiny}", f"data.train={data}", "copilot.layers=[1, 3]",
        f"run.folder={folder}", "pilot.lora.first_layer=0", "data.completion_pattern=null", "pilot.learning_rate=1e-4", "--plan",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rounds" in done.stdout and "free disk" in done.stdout and "unknown" not in done.stdout
    assert done.stdout.splitlines()[-1] == "False", "a plan needs no Ray"
    assert not folder.exists()


def test_unknown_hub_id_gives_a_plan_with_unknowns_and_is_refused(tmp_path: Path) -> None:
    """Fault 22: the plan of a run that would refuse ends with exit code 2 and the reason."""
    done = tc_ray("train", "demo", "model.pilot=nobody/no-such-model", f"run.folder={tmp_path}", "--plan")
    assert done.returncode == 2, done.stderr
    assert "tc-ray: the run would refuse: the config of nobody/no-such-model cannot be read here" in done.stderr
    assert "unknown parameters" in done.stdout and "sizes unknown" in done.stdout
    assert "16 examples per round" in done.stdout


def test_a_base_that_cannot_be_read_leaves_the_rest_known(tiny: Path, data: Path, tmp_path: Path) -> None:
    plan = make_plan(config_of(tiny, str(data), tmp_path / "run", model={"copilot": "nobody/no-such-model"}))
    assert plan.sizes is not None and plan.sizes.pilot and plan.sizes.copilot is None
    assert plan.log_bytes and plan.rounds
    assert "the config of nobody/no-such-model" in plan.refusals[0] and "layers and width unknown" in str(plan)


def test_what_the_plan_shows_of_the_copilot(data: Path, tmp_path: Path) -> None:
    base = {"model": {"copilot": str(folder_of("llama", "narrow"))}, "copilot": {"layers": None}}
    text = str(make_plan(config_of(folder_of("llama"), str(data), tmp_path / "run", **base)))
    assert "every layer of" in text and "3 layers, width 24 (Pilot 32)" in text


def test_every_recipe_has_a_plan(tiny: Path) -> None:
    for recipe in sorted((ROOT / "tc_ray" / "recipes").glob("*.yaml")):
        named = load_config(recipe).model.pilot
        overrides = ["model.copilot=null", "copilot.layers=null", "pilot.lora.first_layer=0", "data.cutoff_tokens=900"]
        if not Path(named).is_dir():
            overrides.append(f"model.pilot={folder_of('flan_t5') if 't5' in named else tiny}")
        plan = make_plan(load_config(recipe, overrides))
        assert plan.rounds and plan.log_bytes, recipe.name
