"""Token ids of an example: prompt ids, completion ids, end token; loss begins at `target_start`.

For an encoder-decoder the prompt is the encoder's source and ends with the end token, as in its pretraining; source and
target are joined in one row. Invariant: input_ids[:target_start] are exactly the prompt's ids at inference. Pure; called by
`encode`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tc_ray.data.encode.prompts import render_prompt, with_system
from tc_ray.data.encode.special_text import encode_content, encode_rendered
from tc_ray.data.source.shapes import Example, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tc_ray.config.data import DataSection


@dataclass(frozen=True)
class Tokens:
    """`input_ids` (prompt + completion + end token); `was_cut`: the completion was too long and lost its end."""

    input_ids: list[int]
    target_start: int
    was_cut: bool


def prompt_ids(
    turns: Sequence[Turn], config: DataSection, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False
) -> list[int]:
    """Ids of the prompt. A plain prompt begins with the begin token if the tokenizer adds one to texts."""
    turns = with_system(turns, config)

    def render(contents: Sequence[str]) -> str:
        written = [Turn(turn.role, content) for turn, content in zip(turns, contents, strict=True)]
        return render_prompt(written, config, tokenizer)

    ids = encode_rendered([turn.content for turn in turns], render, tokenizer)
    begin = tokenizer.bos_token_id
    if config.template == "plain" and begin is not None and tokenizer("a")["input_ids"][:1] == [begin]:
        ids.insert(0, begin)
    if encoder_decoder:
        ids.append(tokenizer.eos_token_id)
    return ids


def completion_ids(completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the completion, end token included."""
    return [*encode_content(completion, tokenizer), tokenizer.eos_token_id]


def encode(
    example: Example, config: DataSection, tokenizer: PreTrainedTokenizerBase, encoder_decoder: bool = False
) -> Tokens | None:
    """Tokens of one example, at most `config.cutoff_tokens`; None when its prompt leaves no space for a target.

    Without a completion the ids are the prompt's and target_start is their number. A completion that is too long loses its
    end, and the end token too, so that the model does not learn to stop there.
    """
    ids = prompt_ids(example.turns, config, tokenizer, encoder_decoder)
    start = len(ids)
    if example.completion is None:
        return Tokens(ids, start, False) if start <= config.cutoff_tokens else None
    if start >= config.cutoff_tokens:
        return None
    ids += completion_ids(example.completion, tokenizer)
    return Tokens(ids[: config.cutoff_tokens], start, len(ids) > config.cutoff_tokens)
