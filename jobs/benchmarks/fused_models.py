"""Models for the inference benchmarks: a Pilot and a Copilot from a folder, or of any size with random weights.

Used by `decoding.py`, `prefill.py` and `copilot_training.py`, which put the repository's root on sys.path before they import this.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from workload import DTYPE, machine, model_folder

from tc_ray.models.copilot import Copilot
from tc_ray.models.copilot.model import choose_layers
from tc_ray.models.fusion import FusedModel
from tc_ray.models.pilot.load import DTYPES, load_pilot


def add_model_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Options that say which models to measure, and on what."""
    parser.add_argument("--model", default=default, help="model folder, or the builtin name; with --hidden: not read")
    parser.add_argument("--every", type=int, default=5, help="the Copilot takes every k-th layer (default 5)")
    parser.add_argument("--target-ids", type=int, default=200, help="tokens of the Copilot's output; 0: all")
    parser.add_argument("--hidden", type=int, help="width of a Llama with random weights to measure instead")
    parser.add_argument("--layers", type=int, default=16, help="its layers")
    parser.add_argument("--vocab", type=int, default=32000, help="its vocabulary")
    parser.add_argument("--copilot-hidden", type=int, help="width of its Copilot; default: the same")
    parser.add_argument("--copilot-layers", type=int, default=8, help="layers of that Copilot")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=DTYPE)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--json", type=Path, help="write the result here too")


def load_models(arguments: argparse.Namespace) -> FusedModel:
    """The fused model that the options ask for, on its device."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="tc-ray-benchmark-") as folder:
        if arguments.hidden:
            path, base = Path(folder) / "pilot", Path(folder) / "base"
            write_llama(path, arguments.hidden, arguments.layers, arguments.vocab)
            write_llama(base, arguments.copilot_hidden or arguments.hidden, arguments.copilot_layers, arguments.vocab)
            layers = list(range(arguments.copilot_layers))
        else:
            path = base = model_folder(arguments.model)
        dtype = DTYPES[arguments.dtype]
        pilot = load_pilot(path, dtype=dtype, random_weights=bool(arguments.hidden)).eval()
        if not arguments.hidden:
            layers = choose_layers(None, arguments.every, pilot.config.num_hidden_layers)
        output_ids = torch.arange(min(arguments.target_ids, pilot.config.vocab_size)) if arguments.target_ids else None
        copilot = Copilot.from_decoder(
            base, layers, pilot=pilot, output_ids=output_ids, random_weights=bool(arguments.hidden)
        )
    return FusedModel.join(pilot.to(arguments.device), copilot.to(dtype).to(arguments.device))


def write_llama(folder: Path, hidden: int, layers: int, vocab: int) -> None:
    """Config of a Llama of this size, with grouped-query attention and a tied head; weights are made when it is loaded."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=vocab,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)


def synchronise(device: str) -> None:
    """Wait for the device, so that a clock reads what it did."""
    if device != "cpu":
        torch.cuda.synchronize()


def device_line(device: str) -> str:
    """What was measured on, in one line."""
    return machine() if device == "cpu" else f"{torch.cuda.get_device_name()}; host {machine()}"
