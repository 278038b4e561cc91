"""A run's folder as far as its Pilot goes: base, adapters, merged weights and a report, made as a run makes them but without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tc_ray.config.load import save_config
from tc_ray.config.schema import RunConfig
from tc_ray.export.gguf_tokenizer import LLAMA3_SPLIT, QWEN2_SPLIT
from tc_ray.files import mark_whole, write_json
from tc_ray.models.pilot.load import DTYPES, add_adapters, load_pilot
from tests.support.tiny_families import make_pilot
from tests.support.tiny_model import CHAT_TEMPLATE

ROWS = 320
"""Of the embedding: more than the tokenizer has tokens."""
TEXT = [
    "What is 12 + 345? The answer is 357.",
    "def f(x):\n    return x ** 2",
    "don't they think that the answer is there",
]


def byte_pair_tokenizer(cut: str = "gpt-2", **more: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, cutting text as llama.cpp's name says. more: of the model."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=cut == "llama-bpe", **more))
    plain, with_cut = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use) for use in (False, True))
    digits = pre_tokenizers.Digits(individual_digits=True)
    before = {
        "gpt-2": with_cut,
        "smollm": pre_tokenizers.Sequence([digits, with_cut]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), plain]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), plain]),
    }
    tokenizer.pre_tokenizer = before[cut]
    tokenizer.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<eos>"]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    tokenizer.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=CHAT_TEMPLATE
    )


def make_pilot_run(
    folder: Path, family: str = "llama", *, dtype: str = "fp32", cut: str = "gpt-2", method: str = "lora"
) -> Path:
    """A finished run in `folder`/run over a base in `folder`/base: its Pilot with weights moved as by training. Returns the run."""
    base, run = make_pilot(family, folder / "base", vocab=ROWS), folder / "run"
    tokenizer = byte_pair_tokenizer(cut)
    tokenizer.save_pretrained(base)
    config = RunConfig.model_validate(
        {
            "run": {"name": "trial", "folder": run},
            "model": {"pilot": str(base)},
            "pilot": {"method": method, "dtype": dtype, "lora": {"rank": 4, "dropout": 0.0}},
        }
    )
    # the order of `pilot/export.py`: base in the run's type, sums in fp32, then rounded
    torch.manual_seed(1)
    model = add_adapters(load_pilot(base, dtype=DTYPES[dtype]), config.pilot)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.float()
    final = run / "pilot" / "final"
    if method == "lora":
        model.save_pretrained(run / "pilot" / "adapter", save_embedding_layers=False)
        mark_whole(run / "pilot" / "adapter")
        model = model.merge_and_unload()
    model.to(DTYPES[dtype]).save_pretrained(final)
    tokenizer.save_pretrained(final)
    mark_whole(final)
    save_config(config, run / "config.yaml")
    data = {"source": str(folder / "rows.jsonl"), "rows": {"train": 90, "validation": 10, "test": 12}}
    for name in ("data", "evaluation"):
        (run / name).mkdir()
    write_json(run / "data" / "data.json", data | {"quarantined": 2, "too_long": 1})
    write_json(run / "evaluation" / "report.json", report())
    return run


def report() -> dict[str, Any]:
    """What `Report.to_dict` gives for one Pilot with a Copilot, as far as a card reads it."""
    line = {"metric": "exact_match", "rows": 12, "value": 0.5, "low": 0.254, "high": 0.746, "nll": 0.81}
    return {
        "results": {"trial/pilot": {"test": line}, "trial": {"test": line | {"value": 0.75, "nll": None}}},
        "sources": {"trial": {"copilot": "copilot", "verdict": "No gain is shown."}},
    }
