"""`tc-ray export`: merged weights, adapters and GGUF answer as the Pilot does in the programs that they are for, or a clear no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from tc_ray.export import gguf_file
from tc_ray.export.check import ExportError
from tc_ray.export.gguf_file import SAMPLES, check_family, permuted
from tc_ray.export.gguf_tokenizer import GgufError, GgufVocabulary
from tc_ray.export.pilot import export_pilot
from tc_ray.models.pilot.load import DTYPES, load_pilot
from tc_ray.models.weights import ExportMismatchError
from tests.support.command_line import tc_ray
from tests.support.pilot_runs import ROWS, byte_pair_tokenizer, make_pilot_run
from tests.support.tiny_families import make_pilot
from tests.support.tiny_model import make_tokenizer

IDS = torch.tensor([[7, 30, 12, 90, 4, 261, 262, 8]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a Llama in fp32; tests read it only."""
    return make_pilot_run(tmp_path_factory.mktemp("export"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    made: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return made


def pilot_logits(run: Path) -> torch.Tensor:
    return logits(load_pilot(run / "pilot" / "final", dtype=torch.float32))


def test_merged_loads_with_transformers_alone(run: Path, tmp_path: Path) -> None:
    folder = export_pilot(run, "merged", tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)), pilot_logits(run))
    wanted = AutoTokenizer.from_pretrained(run / "pilot" / "final")(list(SAMPLES))["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(list(SAMPLES))["input_ids"] == wanted


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_on_the_base_are_the_pilot(dtype: str, tmp_path: Path) -> None:
    """fp32: sums in another order. bf16: the merged weights are rounded to 8 bits, those of the adapters are not."""
    run = make_pilot_run(tmp_path, dtype=dtype)
    folder = export_pilot(run, "adapter", tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=DTYPES[dtype]).float()
    before, found = logits(base), logits(PeftModel.from_pretrained(base, folder))
    wanted = pilot_logits(run)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= (1e-5 if dtype == "fp32" else 0.05) * scale
    assert float((before - wanted).abs().max()) > 0.1 * scale, (
        "the adapters change nothing: the comparison proves nothing"
    )
    # no path of this machine is handed on
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"


GGUF_CASES = [
    ("llama", "fp32", "gpt-2"),
    ("llama", "bf16", "smollm"),
    ("llama", "fp32", "llama-bpe"),
    ("qwen2", "bf16", "qwen2"),
]


@pytest.mark.parametrize(("family", "dtype", "cut"), GGUF_CASES)
def test_gguf_is_the_pilot(family: str, dtype: str, cut: str, tmp_path: Path) -> None:
    run = make_pilot_run(tmp_path, family, dtype=dtype, cut=cut)
    folder = export_pilot(run, "gguf", tmp_path / "gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="pilot.gguf", dtype=torch.float32)
    wanted = pilot_logits(run)
    assert float((logits(model) - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    fields = {name: field.contents() for name, field in gguf.GGUFReader(folder / "pilot.gguf").fields.items()}
    own = AutoTokenizer.from_pretrained(run / "pilot" / "final")
    assert fields["general.architecture"] == family
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", cut)
    assert fields["tokenizer.ggml.eos_token_id"] == own.eos_token_id == 1
    assert fields["tokenizer.chat_template"] == own.chat_template
    assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == (False, False)
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == ROWS
    think = own.convert_tokens_to_ids("<think>")
    assert (tokens[1], kinds[1], tokens[think], kinds[think]) == ("<eos>", 3, "<think>", 4)
    assert (tokens[ROWS - 1], kinds[ROWS - 1]) == (f"[PAD{ROWS - 1}]", 5)
    assert tokens[: len(own)] == own.convert_ids_to_tokens(range(len(own)))


def test_permuted_rows_rotate_as_transformers_does() -> None:
    """Derived from the two rotations themselves: the products of queries and keys stay, at any two positions."""
    config = CONFIG_MAPPING["llama"](hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    drawn = torch.Generator().manual_seed(2)
    query, key = (torch.randn(24, 24, generator=drawn, dtype=torch.float64) for _ in range(2))
    x, y = (torch.randn(24, generator=drawn, dtype=torch.float64) for _ in range(2))

    def halves(rows: torch.Tensor, position: int) -> torch.Tensor:
        """transformers: rows i and i + 4 of a head of 8."""
        a, b = rows.view(3, 8).split(4, dim=1)
        angle = position * 0.7 ** torch.arange(4, dtype=torch.float64)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    def neighbours(rows: torch.Tensor, position: int) -> torch.Tensor:
        """llama.cpp: rows 2i and 2i + 1."""
        a, b = rows.view(3, 4, 2).unbind(2)
        angle = position * 0.7 ** torch.arange(4, dtype=torch.float64)
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=2).flatten(1)

    stored = [
        permuted(f"model.layers.0.self_attn.{part}.weight", weight, config)
        for part, weight in (("q_proj", query), ("k_proj", key))
    ]
    wanted = (halves(query @ x, 5) * halves(key @ y, 2)).sum(1)
    found = (neighbours(stored[0] @ x, 5) * neighbours(stored[1] @ y, 2)).sum(1)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(permuted("model.layers.0.self_attn.v_proj.weight", query, config), query)


def test_a_file_that_is_not_the_pilot_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "permuted", lambda name, weight, config: weight)
    with pytest.raises(ExportMismatchError, match=r"pilot\.gguf, read back, has another weight .*q_proj\.weight"):
        export_pilot(run, "gguf", tmp_path / "gguf")
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_not_the_pilots(tmp_path: Path) -> None:
    run = make_pilot_run(tmp_path)
    make_pilot("llama", tmp_path / "base", vocab=ROWS, seed=9)
    with pytest.raises(ExportMismatchError, match="the base with these adapters has another weight"):
        export_pilot(run, "adapter", None)
    assert not (run / "export-adapter").exists()


FAMILIES = {
    "mistral": "a Pilot of the family mistral cannot be written as GGUF here, only llama and qwen2",
    "gemma3": "the family gemma3_text",
    "flan_t5": "the family t5",
    "llama3": "rope_type of this Pilot is llama3",
    "qwen2_sliding": "use_sliding_window of this Pilot is True",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_are_refused_by_name_with_the_way_on(family: str, tmp_path: Path) -> None:
    config = load_pilot(make_pilot(family, tmp_path / family), dtype=torch.float32, names_only=True).config
    with pytest.raises(GgufError, match=FAMILIES[family]) as raised:
        check_family(config)
    assert "--to merged" in str(raised.value) and "convert_hf_to_gguf.py" in str(raised.value)


def test_biases_are_refused() -> None:
    with pytest.raises(GgufError, match="attention_bias of this Pilot is True"):
        check_family(CONFIG_MAPPING["llama"](attention_bias=True))


def prefixed(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowercased(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def stripped(tokenizer: Any) -> None:
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def endless(tokenizer: Any) -> None:
    tokenizer.eos_token = None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (prefixed, "cuts texts before its merges in a way"),
        (lowercased, "changes texts before it cuts them"),
        (stripped, "takes blanks or whole words only"),
        (endless, "has no end token"),
    ],
)
def test_other_tokenizers_are_refused(spoil: Callable[[Any], None], words: str) -> None:
    tokenizer = byte_pair_tokenizer()
    GgufVocabulary.of(tokenizer, ROWS)
    spoil(tokenizer)
    with pytest.raises(GgufError, match=words):
        GgufVocabulary.of(tokenizer, ROWS)


def test_tokenizers_that_have_no_form_in_gguf() -> None:
    with pytest.raises(GgufError, match="no byte-level BPE tokenizer"):
        GgufVocabulary.of(byte_pair_tokenizer(byte_fallback=True), ROWS)
    with pytest.raises(GgufError, match="has no merges"):
        GgufVocabulary.of(make_tokenizer(), ROWS)
    with pytest.raises(GgufError, match="only 280 rows of its embedding"):
        GgufVocabulary.of(byte_pair_tokenizer(), 280)


def test_runs_that_have_no_such_pilot(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is no run folder"):
        export_pilot(tmp_path, "merged", None)
    with pytest.raises(ExportError, match="trained all weights"):
        export_pilot(make_pilot_run(tmp_path, method="full"), "adapter", None)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "pilot" / "adapter")
    with pytest.raises(ExportError, match="adapters were not kept by this run; use --to merged"):
        export_pilot(copy, "adapter", None)
    (copy / "pilot" / "final" / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="holds no finished Pilot"):
        export_pilot(copy, "merged", None)
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match="there exists; remove it, or name another folder with --out"):
        export_pilot(run, "merged", tmp_path / "there")


def test_command(run: Path, tmp_path: Path) -> None:
    done = tc_ray("export", run, "--to", "merged", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"written and read back: {tmp_path / 'out'}"]
    again = tc_ray("export", run, "--to", "merged", "--out", tmp_path / "out")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1 and "exists" in again.stderr
    other = tc_ray("export", run, "--to", "onnx")
    assert other.returncode == 2 and "gguf" in other.stderr
    alone = tc_ray("export", run, "--to", "merged", "--public")
    assert alone.returncode == 2 and "--push" in alone.stderr
