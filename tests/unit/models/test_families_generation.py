"""Ways to decode with the fused model: all of them transformers' own loops, on p~.

Sequences are compared exactly. Scores and logits: 1e-5 relative to the largest entry where two ways of computing meet
(float32, other order of sums), bit for bit where lambda is 0.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from tc_ray.models.fusion import FusedModel
from tests.support.family_reference import Fusion, beam_search, greedy
from tests.support.family_samples import (
    folder_of,
    left_padded,
    make_copilot,
    new_pilot,
    prompts,
    quiet,
    reference_model,
    spoken,
)
from tests.support.reference_samples import close
from tests.support.tiny_families import ENCODER_DECODER, FAMILIES

quiet()

SOME = ("llama", "gemma3", "flan_t5")


def joined(family: str, space: str = "probability", feedback: str = "own") -> tuple[FusedModel, Fusion]:
    copilot, made = make_copilot(family)
    lam = 1.0 if space == "probability" else 8.0
    fused = FusedModel.join(new_pilot(family), copilot, lam=lam, space=space, feedback=feedback)
    positions = "target" if family in ENCODER_DECODER else "all"
    return fused, Fusion(made.pilot, copilot, made, lam, space, feedback, positions=positions)


def generate(model: Any, rows: list[list[int]], **given: Any) -> Any:
    """`generate` on a left-padded batch, with everything it can tell."""
    ids, mask = left_padded(rows)
    given = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True} | given
    return model.generate(ids, attention_mask=mask, **given)


def said(model: Any, rows: list[list[int]], **given: Any) -> list[list[int]]:
    return spoken(model, generate(model, rows, **given).sequences, max(len(row) for row in rows))


# -- beams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0])
def test_beam_search_at_lambda_zero_is_the_pilot_s(family: str, length_penalty: float) -> None:
    """Sequences and scores bit for bit, in a left-padded batch, all beams returned."""
    fused, reference = joined(family)
    likely = greedy(Fusion(reference.pilot, None, reference.made, lam=0.0), prompts()[0], 2)[1]
    given = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": likely, "length_penalty": length_penalty}
    ours, theirs = generate(fused, prompts(), lam=0.0, **given), generate(fused.pilot, prompts(), **given)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.sequences_scores, theirs.sequences_scores)
    corrected = generate(fused, prompts(), **given)
    assert corrected.sequences.shape != ours.sequences.shape or not torch.equal(corrected.sequences, ours.sequences)


@pytest.mark.parametrize(("space", "feedback"), [("probability", "own"), ("logits", "realised")])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_beam_search_is_the_reference_s(family: str, space: str, feedback: str) -> None:
    """Each beam carries its own errors: wherever beams cross, caches must follow."""
    fused, reference = joined(family, space, feedback)
    rows = prompts()[:2]
    end = greedy(reference, rows[0], 3)[2]
    out = generate(
        fused, rows, max_new_tokens=5, num_beams=3, num_return_sequences=3, eos_token_id=end, length_penalty=0.5
    )
    found = spoken(fused, out.sequences, max(len(row) for row in rows))
    for i, prompt in enumerate(rows):

        def log_probs(tokens: list[int], prompt: list[int] = prompt) -> torch.Tensor:
            return reference.logits(prompt, tokens)[-1].log_softmax(-1)

        wanted = beam_search(log_probs, beams=3, steps=5, end=end, length_penalty=0.5)
        for j, (score, tokens) in enumerate(wanted):
            assert found[3 * i + j][: len(tokens)] == tokens
            assert math.isclose(score, float(out.sequences_scores[3 * i + j]), rel_tol=1e-4)
    assert len({tuple(row) for row in found}) > 3


@pytest.mark.parametrize("family", SOME)
def test_each_sequence_of_a_batch_has_its_own_lambda(family: str) -> None:
    """Greedy, beams, and several sequences each."""
    fused, _ = joined(family, "logits")
    lam = torch.tensor([8.0, 0.0, 3.0])
    for given in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        count = given.get("num_return_sequences", 1)
        together = said(fused, prompts(), lam=lam, **given)
        for i, (prompt, own) in enumerate(zip(prompts(), lam.tolist(), strict=True)):
            alone = said(fused, [prompt], lam=own, **given)
            for one, other in zip(together[count * i : count * (i + 1)], alone, strict=True):
                assert one[: len(other)] == other
        assert together[count] == said(fused.pilot, [prompts()[1]], **given)[0]


# -- sampling -----------------------------------------------------------------------------------------------------

SAMPLING = [
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4},
    {
        "temperature": 1.3,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "num_return_sequences": 2,
    },
]


@pytest.mark.parametrize("given", SAMPLING, ids=lambda given: "-".join(given) if len(given) < 2 else "all")
@pytest.mark.parametrize("family", SOME)
def test_sampling(family: str, given: dict[str, Any]) -> None:
    """Reproducible with a seed; the Pilot's at lambda 0; what is sampled from is p~ of the tokens sampled."""
    fused, reference = joined(family)
    given = {"do_sample": True, "output_logits": True, "top_k": 0} | given

    def sampled(model: Any, **more: Any) -> Any:
        torch.manual_seed(21)
        return generate(model, prompts(), **given, **more)

    one, again, zero, plain = sampled(fused), sampled(fused), sampled(fused, lam=0.0), sampled(fused.pilot)
    assert torch.equal(one.sequences, again.sequences)
    assert torch.equal(zero.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(zero.scores, plain.scores, strict=True))
    assert one.sequences.shape != plain.sequences.shape or not torch.equal(one.sequences, plain.sequences)
    tokens = spoken(fused, one.sequences, max(len(row) for row in prompts()))[0]
    tokens = tokens[: tokens.index(1)] if 1 in tokens else tokens
    expected = reference.logits(prompts()[0], tokens[:-1]).exp()
    close(torch.stack([step[0] for step in one.logits[: len(tokens)]]).exp(), expected, 3e-5)


@pytest.mark.parametrize("family", SOME)
def test_beams_that_sample(family: str) -> None:
    fused, _ = joined(family)
    given = {"do_sample": True, "num_beams": 3, "top_k": 0}
    found = []
    for model, more in ((fused, {}), (fused, {}), (fused, {"lam": 0.0}), (fused.pilot, {})):
        torch.manual_seed(4)
        found.append(generate(model, prompts(), **given, **more).sequences)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


# -- stopping and streaming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_stop_strings(family: str) -> None:
    fused, reference = joined(family)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(family))
    # one byte a token: only one below 128 is a text by itself, and not every prompt leads to one
    for prompt in prompts(4):
        wanted = greedy(reference, prompt, 10)
        texts = [tokenizer.decode([token]) for token in wanted]
        stops = [text for text in texts[1:] if text.isascii() and text != texts[0]]
        if stops:
            break
    out = said(fused, [prompt], max_new_tokens=10, stop_strings=stops[:1], tokenizer=tokenizer)
    assert out[0] == wanted[: texts.index(stops[0]) + 1]
    assert len(out[0]) > 1


@pytest.mark.parametrize("family", SOME)
def test_sequences_end_where_they_end(family: str) -> None:
    """In a batch, one that has ended is padded and the others go on as if alone."""
    fused, reference = joined(family)
    end = greedy(reference, prompts()[1], 4)[2]
    rows = said(fused, prompts(), max_new_tokens=7, eos_token_id=end)
    lengths = set()
    for prompt, row in zip(prompts(), rows, strict=True):
        wanted = greedy(reference, prompt, 7, end)
        lengths.add(len(wanted))
        assert row[: len(wanted)] == wanted and set(row[len(wanted) :]) <= {0}
    assert len(lengths) > 1


class Collected(BaseStreamer):
    """Tokens as a streamer gets them."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("family", SOME)
def test_streamer(family: str) -> None:
    fused, reference = joined(family)
    streamer, prompt = Collected(), prompts()[0]
    out = fused.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.ended and streamer.pieces[0] == ([0] if family in ENCODER_DECODER else prompt)
    assert [token for piece in streamer.pieces for token in piece] == out[0].tolist()
    assert [token for piece in streamer.pieces[1:] for token in piece] == greedy(reference, prompt, 6)


def test_a_forced_beginning_of_the_target() -> None:
    """Decoder tokens given to `generate` are rows of the Copilot like any other."""
    fused, reference = joined("flan_t5")
    prompt, prefix = prompts()[0], [40, 2, 177]
    out = fused.generate(
        torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *prefix]]), max_new_tokens=4, do_sample=False
    )
    tokens = list(prefix)
    for _ in range(4):
        tokens.append(int(reference.logits(prompt, tokens)[-1].argmax()))
    assert out[0, 1:].tolist() == tokens


# -- drafts -------------------------------------------------------------------------------------------------------


class Widths:
    """How many tokens each call of a model got, and how many calls."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.widths: list[int] = []
        self.close = model.register_forward_pre_hook(self._note, with_kwargs=True).remove

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("decoder_input_ids")
        self.widths.append((kwargs["input_ids"] if ids is None else ids).shape[1])


@pytest.mark.parametrize(
    ("family", "feedback"), [*((family, "own") for family in FAMILIES), *((family, "realised") for family in SOME)]
)
def test_assisted_decoding_says_what_greedy_says(family: str, feedback: str) -> None:
    """Drafts by the Pilot alone: some are taken, some are cropped from both caches again."""
    fused, _ = joined(family, "logits", feedback)
    assistant, ids = new_pilot(family), torch.tensor([prompts()[1]])
    assistant.generation_config.update(
        num_assistant_tokens=3, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    given = {"max_new_tokens": 12, "do_sample": False}
    drafted, taken = 0, 0
    for lam in (2.0, 8.0, 30.0):  # the weaker the correction, the more of the Pilot's drafts are right
        fused.default_lam = lam
        plain = fused.generate(ids, **given)
        widths = Widths(fused)
        assert fused.generate(ids, assistant_model=assistant, **given).tolist() == plain.tolist()
        widths.close()
        said = len(spoken(fused, plain, ids.shape[1])[0])
        drafted += 3 + sum(width - 1 for width in widths.widths[1:])  # the first call has the prompt and 3 drafts
        taken += said - len(widths.widths)
    assert 0 < taken < drafted, f"{taken} of {drafted} drafts were right: taking and cropping are not both tested"


@pytest.mark.parametrize("family", SOME)
def test_assisted_decoding_with_a_lambda_of_its_own(family: str) -> None:
    fused, _ = joined(family, "logits")
    given = {"max_new_tokens": 8, "do_sample": False, "lam": 1.0}
    ids = torch.tensor([prompts()[1]])
    out = fused.generate(ids, assistant_model=reference_model(family), **given)
    assert out.tolist() == fused.generate(ids, **given).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup_says_what_greedy_says(family: str) -> None:
    """Drafts looked up in a prompt that holds the tokens to come, in another order; an encoder-decoder looks them up in
    what its decoder has been given."""
    fused, _ = joined(family, "logits", "own")
    given: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    prompt = prompts()[0]
    tokens = spoken(fused, fused.generate(torch.tensor([prompt]), **given), len(prompt))[0]
    if family in ENCODER_DECODER:
        given["decoder_input_ids"] = torch.tensor([[0, *tokens, *prompt[:2], *tokens[:1]]])
    else:
        prompt = [*tokens[6:], *prompt, *tokens[:6], *prompt]
    ids = torch.tensor([prompt])
    plain = fused.generate(ids, **given)
    widths = Widths(fused)
    out = fused.generate(ids, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **given)
    assert out.tolist() == plain.tolist()
    assert max(widths.widths[1:]) > 1, "nothing was looked up"


def test_decoding_without_a_cache_is_refused() -> None:
    fused, _ = joined("llama")
    with pytest.raises(ValueError, match="use_cache"):
        fused.generate(torch.tensor([prompts()[0]]), max_new_tokens=3, use_cache=False)
