"""`tc-ray fuse`: a Copilot on a Pilot it was not trained beside gives what joining the two in memory gives, or a clear no."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tc_ray.export.check import ExportError
from tc_ray.export.join import Fusion, fuse_models
from tc_ray.files import DamagedFileError
from tc_ray.models.copilot import Copilot
from tc_ray.models.families import UnknownFamilyError
from tc_ray.models.folder import NoFusedModelError
from tc_ray.models.fusion import FusedModel
from tc_ray.models.fusion.core import FusionError
from tc_ray.models.identity import ModelSourceError, vocabulary_hash
from tc_ray.models.pilot.load import load_pilot
from tests.support.command_line import tc_ray
from tests.support.family_samples import PADDED, folder_of, left_padded, make_copilot, new_pilot, prompts
from tests.support.tiny_families import VOCAB, make_narrow, make_pilot
from tests.support.tiny_model import make_tokenizer

FAMILIES = ("llama3", "qwen2", "gemma3", "flan_t5")


def exported(
    folder: Path, family: str = "llama", *, base: str = "pilot", pilot: str = "pilot", tokenizer: str | None = None
) -> Path:
    """The export of a run: a Pilot, a Copilot trained beside it, and settings that are no default."""
    told = vocabulary_hash(AutoTokenizer.from_pretrained(folder_of(family))) if tokenizer is None else tokenizer
    copilot, _ = make_copilot(family, base=base, pilot=pilot, tokenizer=told)
    fused = FusedModel.join(new_pilot(family, pilot), copilot, lam=0.3, space="logits", feedback="own")
    fused.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder / "pilot")
    provenance = {"run": "earlier", "pilot": f"some/{family}", "rounds": 7, "verdict": "helps", "python": "3"}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def fuse(pilot: Path | str, copilot: Path, out: Path, **options: Any) -> Fusion:
    return fuse_models(str(pilot), copilot, out, **{"lam": None, "space": None, "feedback": None} | options)


@torch.no_grad()
def padded(model: Path, folder: Path, family: str) -> Path:
    """The same model with a vocabulary of PADDED tokens; those it did not have are unlikely ones."""
    small = load_pilot(model, dtype=torch.float32).state_dict()
    large = load_pilot(make_pilot(family, folder, vocab=PADDED), dtype=torch.float32)
    for name, weight in large.state_dict().items():
        weight.mul_(0.05)[: len(small[name])] = small[name]
    large.save_pretrained(folder)
    return folder


def batch(fused: FusedModel) -> dict[str, torch.Tensor]:
    ids, mask = left_padded(prompts())
    if not fused.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    fed = torch.randint(2, VOCAB, (len(ids), 5), generator=torch.Generator().manual_seed(3))
    fed[:, 0] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": fed}


def generated(fused: FusedModel, beams: int) -> list[list[int]]:
    ids, mask = left_padded(prompts())
    options = {"num_beams": beams, "do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    return fused.generate(ids, attention_mask=mask, **options).tolist()  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("base", ["pilot", "narrow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_folder_is_pilot_and_copilot_joined(family: str, base: str, tmp_path: Path) -> None:
    run = exported(tmp_path / "run" / "export", family, base=base)
    other = make_pilot(family, tmp_path / "other", seed=7)
    fuse(other, run.parent, tmp_path / "fused")
    fused = FusedModel.from_pretrained(tmp_path / "fused")
    assert (fused.default_lam, fused.space, fused.feedback) == (0.3, "logits", "own")
    pilot = load_pilot(other, dtype=torch.float32).eval()
    joined = FusedModel.join(pilot, Copilot.from_pretrained(run / "copilot"), lam=0.3, space="logits", feedback="own")
    for beams in (1, 3):
        assert generated(fused, beams) == generated(joined, beams)
    logits = fused(**batch(fused), logits_to_keep=4).logits
    assert torch.equal(logits, joined(**batch(fused), logits_to_keep=4).logits)
    assert not torch.equal(logits, fused(**batch(fused), logits_to_keep=4, lam=0.0).logits), "no correction at all"


@pytest.mark.parametrize(
    ("family", "base"), [("llama3", "pilot"), ("qwen2", "narrow"), ("gemma3", "pilot"), ("flan_t5", "narrow")]
)
def test_vocabularies_of_other_sizes_are_aligned_by_token_id(family: str, base: str, tmp_path: Path) -> None:
    """A Pilot padded to 270 tokens and the same one of 258, with a Copilot made for 258 and one made for 270."""
    small = make_pilot(family, tmp_path / "small", seed=7)
    large = padded(small, tmp_path / "large", family)
    for made_for in ("pilot", "pilot-padded"):
        run = exported(tmp_path / made_for, family, base=base, pilot=made_for)
        models = {}
        for name, folder in (("small", small), ("large", large)):
            fuse(folder, run, tmp_path / f"{name}-{made_for}", lam=4.0)
            models[name] = FusedModel.from_pretrained(tmp_path / f"{name}-{made_for}")
            texts = generated(models[name], 1)
            assert texts != generated(FusedModel.join(models[name].pilot, models[name].copilot, lam=0.0), 1)
        kept = batch(models["small"]) | {"logits_to_keep": 4}
        less, more = models["small"](**kept).logits, models["large"](**kept).logits
        assert (less.shape[-1], more.shape[-1]) == (VOCAB, PADDED)
        torch.testing.assert_close(more[..., :VOCAB], less, rtol=0, atol=2e-5)
        if made_for == "pilot":  # ids the Copilot does not have get no correction
            plain = models["large"](**kept, lam=0.0).logits
            assert torch.equal(more[..., VOCAB:], plain[..., VOCAB:])


def test_what_stands_in_the_folder(tmp_path: Path) -> None:
    run = exported(tmp_path / "run" / "export")
    other = make_pilot("llama", tmp_path / "other", seed=7)
    (other / "LICENSE").write_text("be kind")
    (other / "pytorch_model.bin").write_text("the same weights again")
    (other / "original").mkdir()
    fusion = fuse(other, run, tmp_path / "deep" / "fused", lam=0.8, feedback="realised")
    out = fusion.folder
    assert sorted(p.name for p in out.iterdir()) == [
        "complete.json",
        "copilot",
        "fusion.json",
        "pilot",
        "provenance.json",
    ]
    assert sorted(p.name for p in out.parent.iterdir()) == ["fused"], "something temporary is left"
    for part, source in (("pilot", other), ("copilot", run / "copilot")):
        for file in (out / part).iterdir():
            assert file.read_bytes() == (source / file.name).read_bytes()
    assert {"LICENSE", "tokenizer.json", "model.safetensors"} <= {p.name for p in (out / "pilot").iterdir()}
    assert not (out / "pilot" / "pytorch_model.bin").exists() and not (out / "pilot" / "original").exists()
    AutoModelForCausalLM.from_pretrained(out / "pilot")
    assert vocabulary_hash(AutoTokenizer.from_pretrained(out / "pilot")) == vocabulary_hash(make_tokenizer())
    settings = json.loads((out / "fusion.json").read_text())
    assert (settings["lam"], settings["space"], settings["feedback"]) == (0.8, "logits", "realised")
    told = json.loads((out / "provenance.json").read_text())
    assert told["pilot"]["from"] == str(other) and told["pilot"]["identity"].startswith("other@")
    beside = told["copilot"]["provenance"]
    assert (beside["run"], beside["pilot"], beside["rounds"]) == ("earlier", "some/llama", 7)
    assert told["copilot"]["from"] == str(run / "copilot") and told["pilot"]["provenance"] == {}
    assert "run earlier beside some/llama" in "\n".join(fusion.lines())
    assert "not chosen" not in "\n".join(fusion.lines()), "lambda was given"


def test_a_sharded_pilot_is_copied_whole(tmp_path: Path) -> None:
    run = exported(tmp_path / "run")
    model = load_pilot(make_pilot("llama", tmp_path / "other", seed=7), dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "sharded" / "consolidated.safetensors").write_bytes(b"the same weights again")
    fuse(tmp_path / "sharded", run, tmp_path / "fused")
    assert sorted(p.name for p in (tmp_path / "fused" / "pilot").glob("*.safetensors")) == shards
    assert generated(FusedModel.from_pretrained(tmp_path / "fused"), 1)
    (tmp_path / "sharded" / shards[0]).unlink()
    with pytest.raises(ExportError, match=f"is not whole: {shards[0]} is missing"):
        fuse(tmp_path / "sharded", run, tmp_path / "again")


def finished_run(folder: Path) -> Path:
    """A run folder whose training is done and whose export is not there."""
    run = exported(folder / "made")
    shutil.copytree(run / "copilot", folder / "copilot" / "final")
    shutil.copytree(run / "pilot", folder / "pilot" / "final")
    return folder


def test_copilot_of_a_run_without_export(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "trial")
    other = make_pilot("llama", tmp_path / "other", seed=7)
    fusion = fuse(other, run / "copilot" / "final", tmp_path / "fused")
    told = "\n".join(fusion.lines())
    assert "0.5 in probability space, own feedback" in told and "the default: not chosen on validation data" in told
    assert "trained in an unknown run" in told
    assert json.loads((tmp_path / "fused" / "fusion.json").read_text())["lam"] == 0.5


def test_pilot_of_an_exported_run(tmp_path: Path) -> None:
    first, second = exported(tmp_path / "first"), exported(tmp_path / "second" / "export", base="narrow")
    fusion = fuse(tmp_path / "second", first, tmp_path / "fused")
    assert fusion.pilot == second / "pilot"
    assert json.loads((tmp_path / "fused" / "provenance.json").read_text())["pilot"]["provenance"]["run"] == "earlier"
    assert "the fusion.json it had: not chosen" in "\n".join(fusion.lines())


def test_fused_folders_can_be_fused_again(tmp_path: Path) -> None:
    """Each folder keeps what the one before it was made of."""
    run, other = exported(tmp_path / "run" / "export"), make_pilot("llama", tmp_path / "other", seed=7)
    first = fuse(other, run / "copilot", tmp_path / "first", lam=0.0)
    assert first.copilot == run / "copilot"
    second = fuse(tmp_path / "first", tmp_path / "first", tmp_path / "second")
    assert second.pilot == tmp_path / "first" / "pilot" and second.copilot == tmp_path / "first" / "copilot"
    assert second.settings == first.settings
    told = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("first", "second")]
    assert told[1]["copilot"]["provenance"] == told[0]
    assert told[0]["copilot"]["provenance"]["run"] == "earlier"


def test_a_copilot_that_does_not_name_its_tokenizer_is_refused(tmp_path: Path) -> None:
    run, other = exported(tmp_path / "run", tokenizer=""), make_pilot("llama", tmp_path / "other", seed=7)
    with pytest.raises(ExportError, match=r"trained with \(not named in its config.json\)"):
        fuse(other, run, tmp_path / "no")


def strange(folder: Path) -> None:
    """Give a Pilot a tokenizer of as many tokens with two of them swapped."""
    rules = json.loads(make_tokenizer().backend_tokenizer.to_str())
    rules["model"]["vocab"] |= {"a": rules["model"]["vocab"]["b"], "b": rules["model"]["vocab"]["a"]}
    (folder / "rules.json").write_text(json.dumps(rules))
    PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "rules.json"), pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)


def other_tokenizer(run: Path, pilot: Path) -> None:
    strange(pilot)


def other_tap(run: Path, pilot: Path) -> None:
    change(run / "copilot", tap="mean over every layer, after the final norm")


def other_pooling(run: Path, pilot: Path) -> None:
    change(run / "copilot", pooling="median")


def other_architecture(run: Path, pilot: Path) -> None:
    shutil.rmtree(pilot)
    make_pilot("t5", pilot)


def other_width(run: Path, pilot: Path) -> None:
    shutil.rmtree(pilot)
    make_narrow("llama", pilot)


def unknown_family(run: Path, pilot: Path) -> None:
    change(pilot, model_type="opt")


def no_config(run: Path, pilot: Path) -> None:
    (pilot / "config.json").unlink()


def no_weights(run: Path, pilot: Path) -> None:
    (pilot / "model.safetensors").unlink()


def cut_weights(run: Path, pilot: Path) -> None:
    os.truncate(pilot / "model.safetensors", 5000)


def no_tokenizer(run: Path, pilot: Path) -> None:
    for file in pilot.glob("tokenizer*"):
        file.unlink()


def no_copilot(run: Path, pilot: Path) -> None:
    shutil.rmtree(run / "copilot")


def no_copilot_weights(run: Path, pilot: Path) -> None:
    (run / "copilot" / "model.safetensors").unlink()


def broken_settings(run: Path, pilot: Path) -> None:
    (run / "fusion.json").write_text("{")


def change(folder: Path, file: str = "config.json", **fields: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (other_tokenizer, ExportError, "the tokenizer of .*other.* is not the one that the Copilot was trained with"),
        (other_tap, FusionError, "trained on other hidden states: 'mean over every layer, after the final norm'"),
        (
            other_pooling,
            FusionError,
            "trained on other hidden states: 'mean over decoder layers .* not 'median over decoder layers",
        ),
        (other_architecture, FusionError, "the Copilot is decoder-only, the Pilot encoder-decoder"),
        (other_width, FusionError, "made for a Pilot of width 32; this Pilot has 24"),
        (unknown_family, UnknownFamilyError, "'opt' has no adapter"),
        (no_config, ModelSourceError, "has no config.json"),
        (no_weights, ExportError, "model.safetensors is missing"),
        (cut_weights, ModelSourceError, "model.safetensors is damaged"),
        (no_tokenizer, ExportError, "has no tokenizer"),
        (no_copilot, NoFusedModelError, "copilot/config.json is missing"),
        (no_copilot_weights, ExportError, "copilot is not whole: model.safetensors is missing"),
        (broken_settings, DamagedFileError, "fusion.json is damaged"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(
    spoil: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    run, other = exported(tmp_path / "run"), make_pilot("llama", tmp_path / "other", seed=7)
    fuse(other, run, tmp_path / "before")
    spoil(run, other)
    with pytest.raises(error, match=words) as raised:
        fuse(other, run, tmp_path / "new" / "fused")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": -0.5}, "lam is -0.5"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"space": "logit"}, "space is 'logit', not one of probability, logits"),
        ({"feedback": "true"}, "feedback is 'true', not one of own, realised"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        fuse(tmp_path, tmp_path, tmp_path / "fused", **options)


def test_what_is_there_is_not_overwritten_and_a_failed_copy_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = exported(tmp_path / "run"), make_pilot("llama", tmp_path / "other", seed=7)
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("run", "empty", "dangling"):
        with pytest.raises(ExportError, match=f"{name} exists"):
            fuse(other, run, tmp_path / name)
    before = sorted(tmp_path.iterdir())
    (other / "tokenizer.json").chmod(0)
    if os.access(other / "tokenizer.json", os.R_OK):  # root reads everything
        monkeypatch.setattr(shutil, "copyfile", lambda source, target: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises((OSError, ExportError)):
        fuse(other, run, tmp_path / "fused")
    assert sorted(tmp_path.iterdir()) == before


def test_command(tmp_path: Path) -> None:
    run, other = exported(tmp_path / "run"), make_pilot("llama", tmp_path / "other", seed=7)
    arguments = ("--pilot", other, "--copilot", run, "--out", tmp_path / "fused")
    done = tc_ray("fuse", *arguments, "--lam", "0.8", "--space", "probability")
    assert done.returncode == 0, done.stderr
    assert "0.8 in probability space, own feedback" in done.stdout and f"tc-ray serve {tmp_path}/fused" in done.stdout
    again = tc_ray("fuse", *arguments)
    assert again.returncode == 2
    assert again.stderr.splitlines() == [f"tc-ray: --out {tmp_path}/fused exists; name a folder that does not"]
    absent = tc_ray("fuse", "--pilot", "owner/model", "--copilot", run, "--out", tmp_path / "no")
    assert absent.returncode == 2 and "owner/model is no folder on this machine" in absent.stderr
    assert len(absent.stderr.splitlines()) == 1
