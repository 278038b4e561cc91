"""A folder with a Llama of any size, random weights and a byte tokenizer: for machines that reach no model hub.

python jobs/benchmarks/random_model.py FOLDER [--hidden 2048] [--layers 16] [--vocab 32000] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, Path(__file__).resolve().parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from fused_models import write_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tc_ray.models.pilot.load import DTYPES


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<end>": 0} | {c: n for n, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def main() -> None:
    """Parse, make, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    write_llama(arguments.folder, arguments.hidden, arguments.layers, arguments.vocab)
    config = AutoConfig.from_pretrained(arguments.folder)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[arguments.dtype])
    model.save_pretrained(arguments.folder)
    byte_tokenizer().save_pretrained(arguments.folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: {count / 1e6:.0f} million random weights")


if __name__ == "__main__":
    main()
