"""Held-out prompts through `generate`, in batches of similar length: completions, or items ranked by beam search.

A causal model gets prompts padded on the left, an encoder-decoder gets sources padded on the right and answers after its
start token. Used by the two metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from tc_ray.data.prepared.folder import LeftOut
from tc_ray.data.source.records import read_prepared
from tc_ray.evaluation.item_trie import ItemTrie, ItemTrieProcessor

_COLUMNS = ["sample_id", "input_ids", "target_start", "answer", "completion", "prompt"]


@dataclass(frozen=True)
class HeldOut:
    """One held-out example. answer: a completion is compared with it. input_ids[target_start:]: the gold tokens. prompt: the
    prompt's text, without the template."""

    sample_id: int
    input_ids: list[int]
    target_start: int
    answer: str
    prompt: str

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt as the model gets it at inference."""
        return self.input_ids[: self.target_start]


def read_counted(file: Path, limit: int | None = None) -> tuple[list[HeldOut], LeftOut]:
    """`read_held_out`, and how many of the given rows are missing from it."""
    return read_held_out(file, limit), LeftOut.read(file, limit)


def read_held_out(file: Path, limit: int | None = None) -> list[HeldOut]:
    """Rows of a prepared Parquet file; a row without `answer` is scored against its completion.

    Raises ValueError: a row has neither. DamagedFileError: the file is no whole Parquet file of prepared rows.
    """
    rows = read_prepared(file, _COLUMNS).slice(0, limit).to_pylist()
    examples = []
    for number, row in enumerate(rows):
        answer = row["answer"] if row["answer"] is not None else row["completion"]
        if answer is None:
            raise ValueError(
                f"{file} row {number}: neither `answer` nor `completion`; there is nothing to score against"
            )
        examples.append(HeldOut(row["sample_id"], row["input_ids"], row["target_start"], answer, row["prompt"]))
    return examples


_NO_ITEM = -1.0e8
"""A score below marks an unused beam: the library starts those at -1e9, and a clamped p~ gives -inf."""


@dataclass(frozen=True)
class _Batch:
    """Examples `rows` (indices) as int64 ids and mask [B, S]; the answer of `generate` begins at column `begin`."""

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    begin: int


def _batches(model: Any, pad: int, examples: Sequence[HeldOut], batch_size: int) -> Iterator[_Batch]:
    left = not model.config.is_encoder_decoder
    # batches of equal lengths waste the least padding
    order = sorted(range(len(examples)), key=lambda i: examples[i].target_start)
    for at in range(0, len(order), batch_size):
        rows = order[at : at + batch_size]
        prompts = [torch.tensor(examples[i].prompt_ids, dtype=torch.long) for i in rows]
        side = "left" if left else "right"
        ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side=side)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side=side)
        yield _Batch(rows, ids.to(model.device), mask.to(model.device), ids.shape[1] if left else 1)


def _generated(
    model: Any,
    tokenizer: Any,
    examples: Sequence[HeldOut],
    batch_size: int,
    lam: float | None,
    trie: ItemTrie | None,
    options: dict[str, Any],
) -> Iterator[tuple[_Batch, Any]]:
    """Each batch with the output of `generate`, without sampling. lam, trie: None for a Pilot, for free text."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options |= {"do_sample": False, "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    if lam is not None:
        options["lam"] = lam
    for batch in _batches(model, pad, examples, batch_size):
        if trie is not None:
            options["logits_processor"] = LogitsProcessorList([ItemTrieProcessor(trie, batch.begin)])
        yield batch, model.generate(batch.ids, attention_mask=batch.mask, **options)


def complete(
    model: Any,
    tokenizer: Any,
    examples: Sequence[HeldOut],
    *,
    max_new_tokens: int,
    batch_size: int,
    num_beams: int = 1,
    lam: float | None = None,
) -> list[str]:
    """Completion texts in the order of `examples`, greedy or by beam search. lam: of a fused model; None for a Pilot."""
    texts = [""] * len(examples)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    for batch, out in _generated(model, tokenizer, examples, batch_size, lam, None, options):
        for row, i in enumerate(batch.rows):
            texts[i] = tokenizer.decode(out[row, batch.begin :], skip_special_tokens=True)
    return texts


def rank(
    model: Any,
    tokenizer: Any,
    examples: Sequence[HeldOut],
    trie: ItemTrie,
    *,
    beams: int,
    batch_size: int,
    lam: float | None = None,
) -> list[list[int]]:
    """Items of `trie` for each example, best first, each at most once, at most `beams` of them.

    An item's score is the sum of its tokens' log-probabilities, end token included, not renormalised over the items. An item
    with probability 0 (a clamped p~) is not ranked.

    Args:
        batch_size: examples at a time; the model runs on `beams` times as many sequences.
        lam: of a fused model; None for a Pilot.
    """
    width = max(2, min(beams, len(trie)))  # with one beam the library does not search
    ranked: list[list[int]] = [[] for _ in examples]
    options: dict[str, Any] = {
        "max_new_tokens": trie.longest,
        "num_beams": width,
        "num_return_sequences": width,
        # plain sums of log-probabilities, searched to the end
        "length_penalty": 0.0,
        "early_stopping": "never",
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    for batch, out in _generated(model, tokenizer, examples, batch_size, lam, trie, options):
        items = [trie.item(ids) for ids in out.sequences[:, batch.begin :].tolist()]
        scored = list(zip(items, out.sequences_scores.tolist(), strict=True))
        for place, i in enumerate(batch.rows):
            found = scored[place * width : (place + 1) * width]
            real = (item for item, score in found if item is not None and score > _NO_ITEM)
            ranked[i] = list(dict.fromkeys(real))[:beams]  # a beam can appear twice, the first is the better one
    return ranked
