"""The Pilot as a GGUF file, which llama.cpp and what is built on it read.

Invariant: a family or setting that GGUF, llama.cpp or the reader here would take for another one is refused by name. Weights are
written in the type that they were trained in: the file read back has the same numbers, bit for bit. Read first: `write_gguf`.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tc_ray.export.compare import compare_logits, compare_weights
from tc_ray.export.gguf_tokenizer import OTHER_WAY, GgufError, GgufVocabulary
from tc_ray.models.weights import ExportMismatchError, library_quiet

FILE = "pilot.gguf"
LOGITS_TOLERANCE = 1e-4
"""Between the logits of the file read back and the Pilot's, both in fp32, as a share of the largest: equal weights; the norms' epsilon
is stored in 32 bits and differs in the eighth digit."""


@dataclass(frozen=True)
class _Architecture:
    """A family that GGUF has. neighbours: llama.cpp rotates rows 2i and 2i + 1 of a head, not i and i + d/2 as transformers does."""

    neighbours: bool


ARCHITECTURES = {"llama": _Architecture(neighbours=True), "qwen2": _Architecture(neighbours=False)}
"""By `model_type`, which is llama.cpp's own name for these."""
SAMPLES = (
    "What is 12 + 345?  x = 7  88",
    "\n\n  def f(x):\n\treturn x ** 2  # it's, don't, WE'LL\r\n",
    "\u00e9t\u00e9 \u6f22\u5b57 \u0440\u0443\u0441 \U0001f642 \u00a0 1,234.5 \u0967\u0968",
)
"""Texts that unlike tokenizers cut unlike: digits, runs of blanks, contractions, other scripts."""


def check_family(config: Any) -> None:
    """Raise GgufError for a Pilot that cannot be written as GGUF. config: transformers' config of the model; nothing is loaded."""
    family = config.model_type
    if family not in ARCHITECTURES:
        raise GgufError(
            f"a Pilot of the family {family} cannot be written as GGUF here, only {' and '.join(ARCHITECTURES)}. {OTHER_WAY}"
        )
    heads = config.hidden_size // config.num_attention_heads
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for field, value, wanted in (
        ("hidden_act", config.hidden_act, "silu"),
        ("rope_type", rope, "default"),
        ("attention_bias", bool(getattr(config, "attention_bias", False)), False),
        ("mlp_bias", bool(getattr(config, "mlp_bias", False)), False),
        ("use_sliding_window", bool(getattr(config, "use_sliding_window", False)), False),
        ("head_dim", getattr(config, "head_dim", None) or heads, heads),
    ):
        if value != wanted:
            raise GgufError(f"{field} of this Pilot is {value}: only {wanted} can be written as GGUF here. {OTHER_WAY}")


def write_gguf(model: Any, tokenizer: Any, file: Path, *, name: str) -> None:
    """Write a model on the CPU and its tokenizer to `file`. Matrices keep their type (fp32 or bf16), vectors become fp32.

    Raises GgufError: a family, setting or tokenizer that cannot be written.
    """
    import gguf

    config = model.config
    check_family(config)
    vocabulary = GgufVocabulary.of(tokenizer, int(config.vocab_size))
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    _add_shape(writer, config)
    _add_vocabulary(writer, vocabulary)
    bf16 = gguf.GGMLQuantizationType.BF16
    writer.add_file_type(
        gguf.LlamaFileType.MOSTLY_BF16 if model.dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32
    )
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for own, weight in model.named_parameters():  # a tied head is not among them, and is not written
        stored = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise GgufError(f"GGUF has no name for this Pilot's weight {own}. {OTHER_WAY}")
        weight = permuted(own, weight.detach(), config).contiguous()
        if weight.ndim > 1 and weight.dtype == torch.bfloat16:
            writer.add_tensor(stored, weight.view(torch.uint8).numpy(), raw_dtype=bf16)
        else:
            writer.add_tensor(stored, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of a query or key projection in the order that llama.cpp's rotation pairs them; any other weight as it is.

    transformers rotates rows i and i + d/2 of a head of d rows by the same angle, llama.cpp rows 2i and 2i + 1 (for `llama`).
    So row i goes to 2i, and row i + d/2 to 2i + 1. Queries and keys move alike, and their products stay.
    """
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((heads[part] for part in name.split(".") if part in heads), None)
    if count is None or not ARCHITECTURES[config.model_type].neighbours:
        return weight
    return weight.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _add_shape(writer: Any, config: Any) -> None:
    head = config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _add_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)
    for role, number in vocabulary.ids.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def check_gguf(file: Path, model: Any, tokenizer: Any) -> None:
    """Raise ExportMismatchError unless the file, read by transformers, has the Pilot's weights, logits and token ids.

    model: in fp32 on the CPU, where a second copy is loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # the GGUF reader draws a bar of its own on stderr
    with library_quiet(), contextlib.redirect_stderr(io.StringIO()):
        found = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
        again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    compare_weights(found, model, 0.0, f"{file.name}, read back,")
    compare_logits(found, model, LOGITS_TOLERANCE, f"{file.name}, read back,")
    _put_digits_back(again, tokenizer)
    for text in (*SAMPLES, *sample_of_special(tokenizer)):
        wanted_ids, found_ids = (one(text, add_special_tokens=False)["input_ids"] for one in (tokenizer, again))
        if wanted_ids != found_ids:
            raise ExportMismatchError(
                f"nothing was published: the tokenizer of {file.name} reads {text!r} as other tokens"
            )


def _put_digits_back(again: Any, tokenizer: Any) -> None:
    """transformers reads the name "smollm" as "gpt-2": the step that cuts digits apart is missing from what it builds."""
    from tokenizers import pre_tokenizers

    steps = (json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}).get("pretokenizers", [])
    if steps and steps[0]["type"] == "Digits":
        cut = [pre_tokenizers.Digits(individual_digits=True), again.backend_tokenizer.pre_tokenizer]
        again.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)


def sample_of_special(tokenizer: Any) -> list[str]:
    """A text with every added token in it, and a short chat."""
    texts = [" ".join(f"a{token}b" for token in tokenizer.get_added_vocab())]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": SAMPLES[0]}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    return texts
