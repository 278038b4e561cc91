"""Weights written one at a time are the folder that transformers writes at once; a mapped model takes what is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tc_ray.models.copilot import Copilot
from tc_ray.models.pilot.load import load_pilot
from tc_ray.models.shards import digest, write_shards
from tests.support.tiny_families import FAMILIES, make_pilot


def write(model: torch.nn.Module, folder: Path, **options: int) -> dict[str, str]:
    weights = dict(model.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    return write_shards(folder, shapes, next(iter(weights.values())).dtype, weights.items(), **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_files_hold_what_the_library_would_write(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load_pilot(make_pilot(family, tmp_path / "model"), dtype=dtype)
    model.save_pretrained(tmp_path / "library")
    wanted = load_file(tmp_path / "library" / "model.safetensors")
    digests = write(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys() == digests.keys()
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    assert digests == {name: digest(weight) for name, weight in wanted.items()}


def test_several_files_and_their_index_load_as_one_model(tmp_path: Path) -> None:
    folder = make_pilot("llama", tmp_path / "model")
    model = load_pilot(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    write(model, folder, shard_bytes=40_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((folder / name).stat().st_size < 50_000 for name in files)
    again = load_pilot(folder, dtype=torch.float32, safetensors=True).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_a_weight_out_of_turn_of_another_shape_or_missing_is_refused(tmp_path: Path) -> None:
    shapes = {"a": torch.Size([2, 3]), "b": torch.Size([4])}
    good = [("a", torch.zeros(2, 3)), ("b", torch.zeros(4))]
    for name, weight in (good[1], ("a", torch.zeros(3, 2)), ("a", torch.zeros(2, 3, dtype=torch.bfloat16))):
        with pytest.raises(ValueError, match=r"is not the weight that is due: a of \(2, 3\)"):
            write_shards(tmp_path, shapes, torch.float32, [(name, weight)])
    with pytest.raises(ValueError, match=r"nothing of .* is not the weight that is due: b"):
        write_shards(tmp_path, shapes, torch.float32, good[:1])
    with pytest.raises(ValueError, match="c is a weight too many"):
        write_shards(tmp_path, shapes, torch.float32, [*good, ("c", torch.zeros(1))])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "t5", "flan_t5"])
def test_a_copilot_of_a_mapped_pilot_is_that_of_a_whole_one(family: str, tmp_path: Path) -> None:
    """Bit for bit, from files in bf16: Gemma's factor on the embedding must not be rounded to it."""
    folder = tmp_path / "pilot"
    load_pilot(make_pilot(family, tmp_path / "made"), dtype=torch.bfloat16).save_pretrained(folder)
    made = []
    for dtype in (torch.float32, None):
        torch.manual_seed(3)
        made.append(Copilot.from_decoder(folder, [0, 2], pilot=load_pilot(folder, dtype=dtype)).state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], weight) for name, weight in made[1].items())


def resident() -> int:
    """Bytes of this process in memory, maps of files too."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_mapped_model_takes_the_memory_of_what_is_touched(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=60_000, tie_word_embeddings=False, **shape))
    table = 60_000 * 512 * 4
    model.save_pretrained(tmp_path)
    del model
    before = resident()
    mapped = load_pilot(tmp_path, dtype=None)
    assert resident() - before < 0.3 * table
    assert float(mapped.get_input_embeddings().weight.detach().sum()) != 0.0
    assert 0.9 * table < resident() - before < 1.4 * table
