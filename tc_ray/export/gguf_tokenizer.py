"""A tokenizer as GGUF holds it: tokens, kinds, merges, and llama.cpp's name for how text is cut before the merges.

Invariant: llama.cpp knows ways to cut text by name only, so a tokenizer that is none of these is refused, never written under the
name of a similar one. Used by `gguf_file`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tc_ray.export.check import ExportError

_GPT2 = ("bytes, cut",)
_PLAIN = ("bytes",)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = _WORDS + r"|\p{N}" + _REST
LLAMA3_SPLIT = _WORDS + r"|\p{N}{1,3}" + _REST

CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    (_GPT2, False): "gpt-2",
    (("digits", *_GPT2), False): "smollm",
    ((QWEN2_SPLIT, *_PLAIN), False): "qwen2",
    ((LLAMA3_SPLIT, *_PLAIN), True): "llama-bpe",
}
"""(steps before the merges, whether a whole word that is a token is taken without merging) -> llama.cpp's name (llama-vocab.cpp)."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens (gguf.TokenType)."""


class GgufError(ExportError):
    """The Pilot cannot be written as GGUF here; the message says why and what to do instead."""


@dataclass(frozen=True)
class GgufVocabulary:
    """What GGUF stores of a tokenizer. tokens, kinds: one for each row of the embedding; adds_*: to every text."""

    cut: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]
    """Of the roles bos, eos, pad and unk, as far as there are any."""
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None

    @classmethod
    def of(cls, tokenizer: Any, rows: int) -> GgufVocabulary:
        """Of a byte-level BPE tokenizer, padded with unused tokens to `rows`. Raises GgufError: it is another one."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _refused(f"it is none of the tokenizers library ({type(tokenizer).__name__})")
        rules: dict[str, Any] = json.loads(backend.to_str())
        cut = _cut(rules)
        model = rules["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        if not merges:
            raise _refused("it has no merges, without which llama.cpp loads no tokenizer")
        tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
        highest = max(*model["vocab"].values(), *(added["id"] for added in rules["added_tokens"]))
        if highest >= rows:
            raise _refused(f"it has a token {highest}, and the Pilot only {rows} rows of its embedding")
        for token, number in model["vocab"].items():
            tokens[number], kinds[number] = token, NORMAL
        for added in rules["added_tokens"]:
            if added["lstrip"] or added["rstrip"] or added["single_word"]:
                raise _refused(
                    f"its token {added['content']!r} takes blanks or whole words only, which GGUF cannot say"
                )
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad", "unk")}
        ids = {role: int(number) for role, number in roles.items() if number is not None}
        if "eos" not in ids:
            raise _refused("it has no end token, and llama.cpp would take another one for it")
        plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
        before, after = full.index(plain[0]), full[::-1].index(plain[-1])
        around = (full[:before], full[len(full) - after :])
        if around[0] not in ([], [ids.get("bos")]) or around[1] not in ([], [ids["eos"]]):
            raise _refused("it puts other tokens around a text than one that begins it and one that ends it")
        return cls(cut, tokens, kinds, merges, ids, bool(before), bool(after), tokenizer.chat_template)


def _cut(rules: dict[str, Any]) -> str:
    """llama.cpp's name for the steps before the merges."""
    model = rules["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
        raise _refused(f"it is no byte-level BPE tokenizer ({model['type']}, as sentencepiece makes them)")
    normalizer = rules["normalizer"]
    # llama.cpp normalises nothing; texts are NFC unless they were made to be otherwise
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise _refused(f"it changes texts before it cuts them ({normalizer['type']})")
    given = rules["pre_tokenizer"] or {"type": "none"}
    steps = tuple(_step(step) for step in given.get("pretokenizers", [given]))
    name = CUTS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise _refused(
            "it cuts texts before its merges in a way that llama.cpp has no name for, as far as is known here"
        )
    return name


def _step(step: dict[str, Any]) -> str:
    """A step in a form that can be compared."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes, cut" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"another: {json.dumps(step)}"


def _refused(why: str) -> GgufError:
    return GgufError(f"the Pilot's tokenizer cannot be written as GGUF here: {why}. {OTHER_WAY}")


OTHER_WAY = "Export it with --to merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py, which knows more models"
