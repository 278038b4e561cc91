"""IncrementalText: whole characters, and nothing of a stop string, however the text is cut into tokens."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest
from tokenizers import normalizers

from tc_ray.serving.text.incremental import IncrementalText
from tc_ray.serving.text.prompt import PromptEncoder, Room
from tests.support.serving_samples import make_tokenizer

TOKENIZER = make_tokenizer()
TEXT = "naïve 🦜🦜 漢字 — 12 + 345 = 357.\n  Ünïcödé €"


def pieces_of(text: str, stops: tuple[str, ...] = (), prompt: str = "What is") -> list[str]:
    incremental = IncrementalText(TOKENIZER, TOKENIZER(prompt)["input_ids"], stops)
    return [*(incremental.push([token]) for token in TOKENIZER(text)["input_ids"]), incremental.finish()]


def test_pieces_are_whole_characters_and_join_to_the_text() -> None:
    pieces = pieces_of(TEXT)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 10


def test_unfinished_character_comes_at_the_end() -> None:
    ids = TOKENIZER("ab 🦜")["input_ids"][:-1]
    incremental = IncrementalText(TOKENIZER)
    pushed = incremental.push(ids)
    assert "\ufffd" not in pushed
    assert pushed + incremental.finish() == TOKENIZER.decode(ids)


def test_prompt_that_ends_inside_a_character() -> None:
    prompt = TOKENIZER("x 🦜")["input_ids"][:-1]
    incremental = IncrementalText(TOKENIZER, prompt)
    assert incremental.push(TOKENIZER("abc")["input_ids"]) + incremental.finish() == "abc"


def test_special_tokens_are_left_out() -> None:
    ids = [
        *TOKENIZER("one")["input_ids"],
        TOKENIZER.convert_tokens_to_ids("<|im_start|>"),
        *TOKENIZER("two")["input_ids"],
    ]
    incremental = IncrementalText(TOKENIZER)
    assert incremental.push(ids) + incremental.finish() == "onetwo"


@pytest.mark.parametrize("stop", ["🦜", "345", "= 3", "\n", "n", "€", "absent", "€ and more"])
def test_one_stop_string(stop: str) -> None:
    assert "".join(pieces_of(TEXT, (stop,))) == TEXT.split(stop)[0]


def first_complete(text: str, stops: tuple[str, ...]) -> str:
    """Reference: read character by character until the text ends with a stop string, the longest where several do."""
    for end in range(1, len(text) + 1):
        hit = [stop for stop in stops if text[:end].endswith(stop)]
        if hit:
            return text[: end - max(map(len, hit))]
    return text


def test_tokens_without_text_cost_nothing_more_each() -> None:
    """With `ignore_eos` end tokens may follow each other: all of them were decoded again with each new one."""
    tokenizer = make_tokenizer()
    text = IncrementalText(tokenizer)
    decoded: list[int] = []
    decode = text._decode
    text._decode = lambda ids: decoded.append(len(ids)) or decode(ids)  # type: ignore[method-assign,func-returns-value]
    for token in [5, *[tokenizer.eos_token_id] * 50, 6]:
        text.push([token])
    assert max(decoded) < 5


def test_any_stop_strings_agree_with_a_reference() -> None:
    draw = random.Random(3)
    for _ in range(400):
        text = "".join(draw.choice("aab漢") for _ in range(draw.randint(0, 14)))
        stops = tuple(
            "".join(draw.choice("aab漢") for _ in range(draw.randint(1, 4))) for _ in range(draw.randint(1, 4))
        )
        pieces = pieces_of(text, stops)
        assert "".join(pieces) == first_complete(text, stops), (text, stops, pieces)


def test_an_echo_of_broken_characters_is_placed_in_linear_time() -> None:
    """A fault found by attack: each token of U+FFFD was decoded with all before it, since no piece ended."""
    text = "\ufffd" * 2000
    encoder = PromptEncoder(make_tokenizer(), len(TOKENIZER))
    ids = encoder.ids(text, Room(10_000))
    begun = time.process_time()
    placed = encoder.placed(text, ids)
    assert time.process_time() - begun < 0.5
    assert placed.text == text and placed.begins == tuple(i // 3 for i in range(6000))


def test_a_marker_is_looked_for_in_the_text_as_it_was_sent() -> None:
    """A fault found by attack: a tokenizer that composes accents decodes another text than the prompt's."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoder = PromptEncoder(tokenizer, len(tokenizer))
    marker = unicodedata.normalize("NFD", "Réponse:")
    prompt = f"Ünï {marker} no {marker}"
    whole = prompt + " an apple"
    border = len(encoder.ids(prompt, Room(100)))
    assert encoder.placed(whole, encoder.ids(whole, Room(100))).first_after(marker, "score_after") == border
