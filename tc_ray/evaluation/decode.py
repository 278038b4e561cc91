"""Held-out prompts decoded: completions by the running batch that serving has too, or by `generate`; items ranked by beams.

The batch takes decoder-only models and greedy decoding. A prompt is computed once for all (space, lam) asked for, and those of
one space are decoded in one batch. `generate` takes the rest: encoder-decoders, beams, rankings. Called by `worker`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from tc_ray.evaluation.item_trie import ItemTrie, ItemTrieProcessor
from tc_ray.evaluation.rows import HeldOut
from tc_ray.evaluation.statistics import Choice
from tc_ray.models.decoding.alone import PilotAlone
from tc_ray.models.decoding.batch import FusedBatch
from tc_ray.models.decoding.prefill import Prefill
from tc_ray.models.fusion import FusedModel
from tc_ray.models.weights import NotFiniteError


def completions(
    model: Any,
    tokenizer: Any,
    rows: Sequence[HeldOut],
    choices: Sequence[Choice],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
) -> list[list[str]]:
    """Completion texts, by row and choice. model: a fused model, or a Pilot, for which lam must be 0.

    Raises NotFiniteError: logits that are not finite.
    """
    prompts = [row.prompt_ids for row in rows]
    if num_beams > 1 or model.config.is_encoder_decoder:
        options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        tokens = []
        for space, lam in choices:
            if isinstance(model, FusedModel):
                model.space = space
            out, begin = _generate(model, tokenizer, prompts, lam, options)
            tokens.append(out[:, begin:].tolist())
    else:
        tokens = _greedy(model, prompts, choices, max_new_tokens, tokenizer.eos_token_id)
    texts = [[tokenizer.decode(ids, skip_special_tokens=True) for ids in of_choice] for of_choice in tokens]
    return [list(of_row) for of_row in zip(*texts, strict=True)]


@torch.inference_mode()
def _greedy(
    model: Any, prompts: Sequence[list[int]], choices: Sequence[Choice], new: int, end: int
) -> list[list[list[int]]]:
    """Tokens up to `end` or `new`, by choice and prompt. A prompt is computed once, whatever is added to it later."""
    batched = model if isinstance(model, FusedModel) else PilotAlone(model)
    largest = max(lam for _, lam in choices)
    prefills = [Prefill(batched, ids, largest) for ids in prompts]
    for prefill in prefills:
        prefill.advance(len(prefill.ids))
    tokens: list[list[list[int]]] = [[[] for _ in prompts] for _ in choices]
    spaces = sorted({space for space, lam in choices if lam}) or [choices[0][0]]
    for space in spaces:
        # one batch for all lambdas of a space; lam 0, which is the same in each, goes with the first
        if isinstance(model, FusedModel):
            model.space = space
        mine = [n for n, (own, lam) in enumerate(choices) if (own if lam else spaces[0]) == space]
        wanted = [(prefill, choices[n][1], tokens[n][row]) for n in mine for row, prefill in enumerate(prefills)]
        _decode(batched, wanted, new, end)
    return tokens


def _decode(
    model: FusedModel | PilotAlone, wanted: Sequence[tuple[Prefill, float, list[int]]], new: int, end: int
) -> None:
    """Fill the tokens of each (prompt, lam, tokens)."""
    batch = FusedBatch(model)
    batch.reserve([batch.need(len(prefill.ids), new, lam != 0) for prefill, lam, _ in wanted])
    running: list[list[int]] = []
    """Tokens by row of the batch."""

    def append(tokens: list[int], token: int) -> bool:
        tokens.append(token)
        return token == end or len(tokens) == new

    for prefill, lam, tokens in wanted:
        prompt = prefill.weighted(lam)
        if not append(tokens, *_best(prompt.fused)):
            batch.join(prompt)
            running.append(tokens)
    while running:
        best = _best(batch.step([tokens[-1] for tokens in running]).fused)
        ended = [row for row, token in enumerate(best) if append(running[row], token)]
        for row in reversed(ended):
            batch.leave(row)
            running[row] = running[-1]
            running.pop()


def _best(logits: torch.Tensor) -> list[int]:
    values, ids = logits.max(1)
    if not bool(values.isfinite().all()):  # NaN anywhere in a row makes its maximum NaN
        raise NotFiniteError("the model's logits are not finite")
    found: list[int] = ids.tolist()
    return found


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    lam: float,
    options: dict[str, Any],
    trie: ItemTrie | None = None,
) -> tuple[Any, int]:
    """The output of `generate` without sampling, and the column at which its answers begin.

    A causal model gets prompts padded on the left; an encoder-decoder gets sources padded on the right and answers after its
    start token.
    """
    left = not model.config.is_encoder_decoder
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    side = "left" if left else "right"
    given = [torch.tensor(ids, dtype=torch.long) for ids in prompts]
    ids = pad_sequence(given, batch_first=True, padding_value=pad, padding_side=side).to(model.device)
    mask = pad_sequence([torch.ones_like(one) for one in given], batch_first=True, padding_side=side).to(model.device)
    begin = ids.shape[1] if left else 1
    options = options | {"do_sample": False, "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id}
    if isinstance(model, FusedModel):
        options["lam"] = lam
    if trie is not None:
        options["logits_processor"] = LogitsProcessorList([ItemTrieProcessor(trie, begin)])
    return model.generate(ids, attention_mask=mask, **options), begin


_NO_ITEM = -1.0e8
"""A score below marks an unused beam: the library starts those at -1e9, and a clamped p~ gives -inf."""


def rankings(
    model: Any, tokenizer: Any, rows: Sequence[HeldOut], choices: Sequence[Choice], trie: ItemTrie, *, beams: int
) -> Iterator[list[list[int]]]:
    """For each choice, the items of `trie` for each row, best first, each at most once, at most `beams` of them.

    An item's score is the sum of its tokens' log-probabilities, end token included, not renormalised over the items. An item
    with probability 0 (a clamped p~) is not ranked. The model runs on `beams` times as many sequences as there are rows.
    """
    width = max(2, min(beams, len(trie)))  # with one beam the library does not search
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
    for space, lam in choices:
        if isinstance(model, FusedModel):
            model.space = space
        out, begin = _generate(model, tokenizer, [row.prompt_ids for row in rows], lam, options, trie)
        items = [trie.item(ids) for ids in out.sequences[:, begin:].tolist()]
        scored = list(zip(items, out.sequences_scores.tolist(), strict=True))
        ranked = []
        for place in range(len(rows)):
            found = scored[place * width : (place + 1) * width]
            real = (item for item, score in found if item is not None and score > _NO_ITEM)
            ranked.append(list(dict.fromkeys(real))[:beams])  # a beam can appear twice, the first is the better one
        yield ranked
