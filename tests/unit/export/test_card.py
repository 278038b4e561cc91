"""The model card of an exported folder: read as the hub reads it, the run's own numbers, the base's licence, no path of the machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tc_ray.config.load import load_saved_config
from tc_ray.data.prepared.folder import LeftOut
from tc_ray.evaluation.compare import Line
from tc_ray.export.card import LIBRARIES, CardSource, card, write_card
from tc_ray.export.licence import licence_of
from tc_ray.export.write import export_fused
from tc_ray.files import is_whole
from tc_ray.models.folder import FusionSettings
from tests.support.evaluation_samples import report_of
from tests.support.pilot_runs import make_pilot_run

APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pilot_run(tmp_path_factory.mktemp("card"), dtype="bf16")


@pytest.fixture
def source(run: Path) -> CardSource:
    config = load_saved_config(run / "config.yaml")
    return CardSource.of_run(run, config, run / "pilot" / "final", fusion=FusionSettings(0.3, "logits", "own"))


@pytest.mark.parametrize("kind", LIBRARIES)
def test_the_hub_reads_the_front_matter(kind: str, source: CardSource, run: Path, tmp_path: Path) -> None:
    write_card(tmp_path, kind, source)  # type: ignore[arg-type]
    text = (tmp_path / "README.md").read_text()
    found = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (
        found["library_name"] == {"fused": "tc-ray", "merged": "transformers", "adapter": "peft", "gguf": "gguf"}[kind]
    )
    assert found["license"] == "unknown" and "neither a card nor a licence file" in text
    assert found["pipeline_tag"] == "text-generation"
    assert {"tc-ray", "lora"} <= set(found["tags"]) and ("gguf" in found["tags"]) == (kind == "gguf")
    assert "base_model" not in found, "the base is a folder here, which the hub does not know"
    assert str(run.parent) not in text
    assert "rows.jsonl: 90 training rows, 10 validation rows,\n12 test rows; 2 bad rows" in text
    assert "| LoRA rank, alpha, dropout | 4, 32, 0.0 |" in text
    assert "| Pilot | test | 12 | accuracy | 50.0% | 25.4% to 74.6% | 0.8100 |" in text
    assert ("| fused | test | 12 | accuracy | 75.0% |" in text) == (kind == "fused")
    assert ("| lambda | 0.3, in logits space, own feedback |" in text) == (kind == "fused")
    assert ("No gain is shown." in text) == (kind == "fused")
    assert ("dtype=torch.bfloat16" in text) == (kind == "adapter")


def test_values_that_are_no_shares_are_not_shown_in_percent(source: CardSource) -> None:
    line = {"metric": "chrf", "rows": 12, "value": 54.25, "low": 50.0, "high": 58.5, "nll": 0.81}
    report = dict(source.report) | {"results": {"trial/pilot": {"test": line}}}
    assert "| Pilot | test | 12 | chrF | 54.2500 | 50.0000 to 58.5000 | 0.8100 |" in card(
        "merged", replace(source, report=report)
    )


@pytest.mark.parametrize("no_copilot", [None, "it failed"])
def test_a_run_writes_one(no_copilot: str | None, tmp_path: Path) -> None:
    """Beside the fused model, with the numbers of the report that it is exported by."""
    run = make_pilot_run(tmp_path)
    shutil.copytree(run / "pilot" / "final", run / "copilot" / "final")
    names = ["m"] if no_copilot else ["m/pilot", "m"]
    lines = [
        Line(name, "test", "nll", 40, LeftOut(), 1.25, 1.0, 1.5, 1.25, None, None, 0.0, "logits") for name in names
    ]
    report = report_of(lines, [], 0.5, no_copilot=no_copilot, exports=True)
    export = export_fused(load_saved_config(run / "config.yaml"), report, rounds=3)
    assert is_whole(export)
    text = (export / "README.md").read_text()
    assert ModelCard.load(export / "README.md").data.library_name == "tc-ray"
    assert ("| fused | test | 40 | NLL | 1.2500 | 1.0000 to 1.5000 | 1.2500 |" in text) == (no_copilot is None)
    assert "| Pilot | test | 40 | NLL | 1.2500 | 1.0000 to 1.5000 | 1.2500 |" in text
    assert str(report.first) in text
    assert ("there is nothing to fuse" in text) == ("FusedModel" not in text) == (no_copilot is not None)
    assert ("| lambda | 0" in text) == (no_copilot is None)


def test_a_run_that_was_not_measured(source: CardSource) -> None:
    text = card("merged", replace(source, report=None, data=None))
    assert "This run was not evaluated." in text and "Not recorded in the run's folder." in text


def test_a_hub_id_is_the_base(source: CardSource, tmp_path: Path) -> None:
    def of(base: str) -> dict[str, object]:
        model = source.config.model.model_copy(update={"pilot": base})
        config = source.config.model_copy(update={"model": model})
        (tmp_path / "README.md").write_text(card("merged", replace(source, config=config)))
        return ModelCard.load(tmp_path / "README.md").data.to_dict()

    assert of("owner/model")["base_model"] == "owner/model"
    assert of("smollm2-135m-instruct")["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_licences(source: CardSource, tmp_path: Path) -> None:
    assert licence_of("smollm2-135m-instruct").name == "apache-2.0"
    base = tmp_path / "base"
    base.mkdir()
    assert licence_of(str(base)).name == "unknown"
    (base / "NOTICE").write_text("Copyright")
    (base / "LICENSE").write_text(APACHE)
    found = licence_of(str(base))
    assert (found.name, found.named_by) == ("apache-2.0", "the file LICENSE in its folder")
    (base / "LICENSE").write_text("\nGEMMA TERMS\nOne. Two.\n")
    found = licence_of(str(base))
    assert (found.name, found.title, found.link) == ("other", "GEMMA TERMS", "LICENSE")
    write_card(tmp_path, "merged", replace(source, licence=found))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "GEMMA TERMS", "LICENSE")
    assert (tmp_path / "LICENSE").read_text().startswith("\nGEMMA") and (tmp_path / "NOTICE").is_file()
    (base / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    assert licence_of(str(base)).name == "mit"
    (base / "README.md").write_text("---\nlicense: [broken\n---\n")
    assert licence_of(str(base)).name == "other"


def test_a_hub_that_cannot_be_asked_leaves_the_licence_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = licence_of("owner/model-that-is-nowhere")
    assert found.name == "unknown" and "the card of owner/model-that-is-nowhere cannot be read" in found.named_by
