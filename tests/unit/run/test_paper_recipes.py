"""The recipes of the paper's settings: what they say, the plan without a hub, and the plan where the models are at hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tc_ray.config.load import load_config
from tc_ray.run.plan.plan import make_plan
from tests.support.tiny_model import make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "tc_ray" / "recipes").glob("paper-*.yaml"))

# The published shapes of the models, as their config.json gives them, and their published numbers of parameters.
_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32}
_QWEN: dict[str, Any] = {"model_type": "qwen2"}
_T5: dict[str, Any] = {"model_type": "t5", "vocab_size": 32128, "d_kv": 64, "feed_forward_proj": "gated-gelu"}
_T5 |= {"decoder_start_token_id": 0, "tie_word_embeddings": False, "is_encoder_decoder": True}
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.2-1B": _LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_key_value_heads": 8}
    | {"head_dim": 64, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
    | {"tie_word_embeddings": False},
    "Qwen/Qwen2.5-7B": _QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen/Qwen2.5-0.5B": _QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "google/flan-t5-large": _T5
    | {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24},
    "google/flan-t5-small": _T5
    | {"d_model": 512, "d_ff": 1024, "num_heads": 6, "num_layers": 8, "num_decoder_layers": 8},
}
PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "google/flan-t5-large": 783_150_080,
}
COPILOTS = {"meta-llama/Llama-3.2-1B": (16, 2048), "Qwen/Qwen2.5-0.5B": (24, 896), "google/flan-t5-small": (8, 512)}
"""Layers and width."""


def stand_in(name: str, folder: Path) -> Path:
    """A folder with the config of a model of the hub and a small tokenizer: all that a plan reads."""
    place = folder / name.replace("/", "--")
    make_tokenizer().save_pretrained(place)
    (place / "config.json").write_text(json.dumps(SHAPES[name]))
    return place


def test_the_papers_four_settings_are_there() -> None:
    pairs = {(c.model.pilot, c.model.copilot) for c in map(load_config, RECIPES)}
    assert pairs == {
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"),
        ("google/flan-t5-large", "google/flan-t5-small"),
    }


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_plan_where_the_models_are_at_hand(recipe: Path, tmp_path: Path) -> None:
    named = load_config(recipe).model
    assert named.copilot is not None
    # a token a byte here: prompts are longer than the cut-off of the recipes
    places = [f"model.pilot={stand_in(named.pilot, tmp_path)}", f"model.copilot={stand_in(named.copilot, tmp_path)}"]
    plan = make_plan(load_config(recipe, [*places, "data.cutoff_tokens=2000", f"run.folder={tmp_path / 'run'}"]))
    sizes = plan.sizes
    assert sizes is not None and sizes.pilot == PARAMETERS[named.pilot]
    assert (sizes.copilot_layers, sizes.copilot_hidden_size) == COPILOTS[named.copilot]
    assert plan.rounds and plan.log_bytes and sizes.copilot_trainable and sizes.copilot
    if plan.config.pilot.method == "full":
        assert sizes.pilot_trainable == sizes.pilot
        return
    config, rank = SHAPES[named.pilot], plan.config.pilot.lora.rank
    head = config["hidden_size"] // config["num_attention_heads"]
    width, inner, kv = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * head
    seven = 2 * (width + width) + 2 * (width + kv) + 3 * (width + inner)  # q, o; k, v; gate, up, down
    assert sizes.pilot_trainable == config["num_hidden_layers"] * rank * seven


PLANS = """
import json, sys
from tests.support.command_line import tc_ray
ends = [tc_ray("train", recipe, "--plan") for recipe in sys.argv[1:]]
print(json.dumps([(end.returncode, end.stdout, end.stderr) for end in ends]))
"""


def test_plan_without_the_hub(tmp_path: Path) -> None:
    """A hub that takes connections and never answers: the worst that a machine without one can have."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PLANS, str(RECIPES[0])]
        began = time.monotonic()
        made = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=240, env={**os.environ, **settings}
        )
    assert time.monotonic() - began < 60, "it asked a dead hub again and again"
    [(code, printed, error)] = json.loads(made.stdout)
    # the plan is printed; here, without the model and its GPUs, the run itself would refuse
    assert code == 2 and error.startswith("tc-ray: the run would refuse: "), error
    named = load_config(RECIPES[0]).model
    for name in {named.pilot, named.copilot}:
        assert f"the config of {name} cannot be read here (the hub does not answer" in printed
    assert "16 examples per round" in printed and "unknown parameters" in printed
