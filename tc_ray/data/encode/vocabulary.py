"""Refuse token ids that the model does not embed: a tokenizer can hold more tokens than the embedding has rows.

Checked before any worker starts, so that the user gets a message instead of an index error on a device. A larger embedding is
padding, which is fine; so is a token without a row that nothing uses. Called by `prepare` and by plans.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tc_ray.data.source.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_special_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raise DataError when the model does not embed the end or the padding token: every run uses them."""
    for token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            check_largest_id(token_id, tokenizer, vocab_size)


def check_largest_id(token_id: int, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    """Raise DataError when the model has no embedding for this id, the largest in use. vocab_size None: not checked."""
    if vocab_size is not None and token_id >= vocab_size:
        raise DataError(
            f"the tokenizer's token {tokenizer.convert_ids_to_tokens(token_id)!r} has the id {token_id}, but the model "
            f"embeds {vocab_size} tokens (ids to {vocab_size - 1}); use the model's own tokenizer, or resize the embedding "
            "(model.resize_token_embeddings(len(tokenizer))) and save model and tokenizer again"
        )
