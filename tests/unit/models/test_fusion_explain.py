"""Explanations and log-probabilities of decoded tokens: against what decoding saw and against the slow reference.

Explanations are recomputed over the finished sequences; that this equals the logits seen while decoding is shown here for every
way to decode. Tolerance where none is given: 1e-5 relative to the largest entry (float32, other order of sums).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tc_ray.models.fusion import Explain, FusedModel
from tc_ray.models.fusion.explain import explain_completions
from tc_ray.models.fusion.scoring import Completions
from tests.support.family_reference import Fusion
from tests.support.family_samples import left_padded, make_copilot, new_pilot, prompts, quiet
from tests.support.reference_samples import close
from tests.support.tiny_families import ENCODER_DECODER, END
from tests.support.tiny_model import make_tokenizer

quiet()

FAMILIES = ("llama", "gemma2", "gemma3", "t5", "flan_t5")
LAM = torch.tensor([3.0, 0.0, 6.0])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2},
    "several samples": {"do_sample": True, "num_return_sequences": 2, "min_p": 0.02},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "length_penalty": 0.0},
}


def joined(family: str, space: str = "logits", feedback: str = "own") -> tuple[FusedModel, Fusion]:
    """The fused model, and the reference of its Pilot."""
    copilot, made = make_copilot(family)
    fused = FusedModel.join(new_pilot(family), copilot, space=space, feedback=feedback)
    return fused, Fusion(made.pilot, copilot, made, 0.0, space, feedback)


def generated(fused: FusedModel, rows: list[list[int]], **given: Any) -> Any:
    """`generate` of a left-padded batch; an end token that comes up soon, so that sequences end at unlike places."""
    ids, mask = left_padded(rows)
    torch.manual_seed(3)
    given = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": likely_end(fused)} | given
    return fused.generate(ids, attention_mask=mask, **given)


def likely_end(fused: FusedModel) -> int:
    ids = torch.tensor([prompts()[0]])
    out = fused.generate(ids, lam=float(LAM[0]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    return int(out[0, -1])


def seen_while_decoding(out: Any, start: int) -> torch.Tensor:
    """log p~ of each returned token from the logits of its step, [R, n]; 0 where none was decoded."""
    tokens = out.sequences[:, start:]
    seen = torch.zeros(tokens.shape)
    beams = out.get("beam_indices")
    for row in range(tokens.shape[0]):
        for step in range(tokens.shape[1]):
            at = row if beams is None else int(beams[row, step])
            if at >= 0:
                seen[row, step] = out.logits[step][at].log_softmax(-1)[tokens[row, step]]
    return seen


def start_of(family: str) -> int:
    return 1 if family in ENCODER_DECODER else max(map(len, prompts()))


def said(out: Any) -> list[list[int]]:
    """Tokens of each returned sequence up to its end."""
    told = out.explanation
    return [told.tokens[row][told.mask[row]].tolist() for row in range(len(told.tokens))]


# -- the recomputation is what decoding saw -----------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["own", "realised"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_is_what_decoding_saw(family: str, way: str, feedback: str) -> None:
    """In a left-padded batch with a lambda for each sequence, ended at unlike places; and nothing else changes."""
    fused, _ = joined(family, feedback=feedback)
    plain = generated(fused, prompts(), lam=LAM, **WAYS[way])
    out = generated(fused, prompts(), lam=LAM, explain=True, logprobs=True, output_logits=True, **WAYS[way])
    assert torch.equal(out.sequences, plain)
    start, told = start_of(family), out.explanation
    seen = seen_while_decoding(out, start)
    mask = out.completion_mask
    assert mask.shape == seen.shape == out.fused_logprobs.shape == out.pilot_logprobs.shape
    assert bool((out.fused_logprobs[~mask] == 0).all()) and bool((out.pilot_logprobs[~mask] == 0).all())
    close(out.fused_logprobs[mask], seen[mask])
    close(told.chosen.fused[..., 0][mask], seen[mask].exp())
    # where each sequence ends: its first end token, or the last step
    tokens = out.sequences[:, start:]
    ends = tokens == likely_end(fused)
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, tokens.shape[1])
    assert mask.sum(1).tolist() == lengths.tolist()
    assert torch.equal(told.tokens, tokens) and torch.equal(told.mask, mask)
    # the sequences with lambda 0 are the Pilot's
    per = len(tokens) // len(LAM)
    assert told.lam.tolist() == LAM.repeat_interleave(per).tolist()
    middle = slice(per, 2 * per)
    assert torch.equal(out.pilot_logprobs[middle], out.fused_logprobs[middle])
    assert float(told.chosen.shift[middle].abs().max()) == 0
    assert float((out.pilot_logprobs - out.fused_logprobs).abs().max()) > 0.1


def test_sequences_ended_at_unlike_places() -> None:
    """Else the test above says nothing about ends."""
    lengths = set()
    for family in FAMILIES:
        fused, _ = joined(family)
        out = generated(fused, prompts(), lam=LAM, logprobs=True)
        lengths |= set(out.completion_mask.sum(1).tolist())
    assert len(lengths) > 2


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_log_probabilities_without_explanation(family: str) -> None:
    fused, _ = joined(family, "probability")
    ids, mask = left_padded(prompts())
    given = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "lam": 0.6}
    alone = fused.generate(ids, logprobs=True, **given)
    both = fused.generate(ids, logprobs=True, explain=True, **given)
    assert "explanation" not in alone and "pilot_logprobs" not in fused.generate(ids, explain=True, **given)
    assert torch.equal(alone.completion_mask, both.completion_mask)
    close(alone.fused_logprobs, both.fused_logprobs)
    close(alone.pilot_logprobs, both.explanation.pilot_logprobs)
    assert isinstance(fused.generate(ids, **given), torch.Tensor)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_score_of_what_was_generated(family: str) -> None:
    """The same numbers by `score`, from the sequences alone."""
    fused, _ = joined(family)
    fused.generation_config.eos_token_id = likely_end(fused)
    ids, mask = left_padded(prompts())
    out = generated(fused, prompts(), lam=LAM, logprobs=True)
    if family in ENCODER_DECODER:
        scores = fused.score(out.sequences, source=ids, source_mask=mask, lam=LAM)
    else:
        scores = fused.score(out.sequences, prompt_length=ids.shape[1], attention_mask=mask, lam=LAM)
    assert torch.equal(scores.mask, out.completion_mask)
    close(scores.fused_logprobs, out.fused_logprobs)


# -- what an explanation says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("space", "feedback", "lam"), [("probability", "own", 0.6), ("logits", "realised", 6.0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_explanation_is_the_reference_s(family: str, space: str, feedback: str, lam: float) -> None:
    """Every probability, correction and rank of every token, from the equations."""
    fused, reference = joined(family, space, feedback)
    weights = torch.tensor([lam, 0.0, lam / 2])
    out = generated(fused, prompts(), lam=weights, explain=Explain(top_k=4), eos_token_id=END)
    told = out.explanation
    assert (told.space, told.feedback, told.lam.tolist()) == (space, feedback, weights.tolist())
    for row, (prompt, tokens) in enumerate(zip(prompts(), said(out), strict=True)):
        before = tokens[:-1]

        def logits(lam: float, space: str, prompt: Any = prompt, before: Any = before) -> torch.Tensor:
            by = Fusion(reference.pilot, reference.copilot, reference.made, lam, space, feedback)
            return by.logits(prompt, before)

        pilot = logits(0.0, space)
        f = logits(1.0, "logits") - pilot
        both = pilot.softmax(-1), logits(float(weights[row]), space).softmax(-1)
        n = len(tokens)
        assert torch.equal(told.pilot_top.ids[row, :n, 0], both[0].argmax(-1))
        assert torch.equal(told.chosen.ids[row, :n, 0], torch.tensor(tokens))
        for candidates in (told.chosen, told.pilot_top, told.fused_top):
            ids = candidates.ids[row, :n]
            for found, dense in ((candidates.pilot, both[0]), (candidates.fused, both[1])):
                torch.testing.assert_close(found[row, :n], dense.gather(1, ids), rtol=0, atol=1e-5)
            # f here is a difference of logits of size 20: five digits less than float32 has are left
            torch.testing.assert_close(candidates.correction[row, :n], f.gather(1, ids), rtol=0, atol=3e-5)
            assert torch.equal(candidates.shift, candidates.fused - candidates.pilot)
        for candidates, dense in ((told.pilot_top.pilot, both[0]), (told.fused_top.fused, both[1])):
            torch.testing.assert_close(candidates[row, :n], dense.topk(4, -1).values, rtol=0, atol=1e-5)
    assert float(told.chosen.correction[1].abs().max()) > 0.01, "f is told also where lambda is 0"


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_corrections_are_told_where_lambda_is_zero(family: str) -> None:
    """The Copilot runs for the explanation alone; nothing comes of what it says."""
    fused, _ = joined(family)
    beside = generated(fused, prompts(), lam=LAM, explain=True, eos_token_id=None).explanation
    alone = generated(fused, prompts()[1:2], lam=0.0, explain=True, eos_token_id=None).explanation
    assert torch.equal(alone.tokens, beside.tokens[1:2])
    close(alone.chosen.correction, beside.chosen.correction[1:2])
    assert float(alone.chosen.correction.abs().min()) > 0
    assert torch.equal(alone.fused_top.fused, alone.pilot_top.pilot)


def test_explanation_as_json() -> None:
    fused, _ = joined("llama", "probability")
    tokenizer = make_tokenizer()
    asked = Explain(top_k=2, logit_lens=True)
    out = generated(fused, prompts(), lam=torch.tensor([0.7, 0.0, 0.4]), explain=asked)
    told, made = out.explanation, out.explanation.to_dict(tokenizer)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["space"], made["feedback"]) == ("probability", "own")
    for row, sequence in enumerate(made["sequences"]):
        assert sequence["lam"] == pytest.approx([0.7, 0.0, 0.4][row])
        assert [token["id"] for token in sequence["tokens"]] == said(out)[row]
        for place, token in enumerate(sequence["tokens"]):
            assert token["text"] == tokenizer.decode([token["id"]])
            assert token["shift"] == pytest.approx(token["fused"] - token["pilot"], abs=1e-6)
            assert token["pilot_logprob"] == pytest.approx(float(told.pilot_logprobs[row, place]))
            assert [c["id"] for c in token["pilot_top"]] == told.pilot_top.ids[row, place].tolist()
            assert [c["fused"] for c in token["fused_top"]] == told.fused_top.fused[row, place].tolist()
            assert [entry["layer"] for entry in token["logit_lens"]] == [1, 2, 3, 4]
            assert token["logit_lens"][-1]["id"] == token["pilot_top"][0]["id"]
            assert token["logit_lens"][-1]["probability"] == pytest.approx(token["pilot_top"][0]["pilot"], rel=1e-4)


def test_a_token_whose_probability_was_taken_away() -> None:
    """A processor may force a token with p~ = 0: log 0 must not break JSON."""
    fused, _ = joined("llama", "probability")
    ids = torch.tensor([prompts()[0]])
    taken = int(fused(ids, lam=0.9).logits[0, -1].argmin())
    assert float(fused(ids, lam=0.9).logits[0, -1, taken]) == float("-inf")

    def force(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, taken] = 0.0
        return forced

    out = fused.generate(ids, lam=0.9, max_new_tokens=1, logits_processor=[force], explain=True, do_sample=False)
    assert out.sequences[0, -1] == taken
    [sequence] = json.loads(json.dumps(out.explanation.to_dict(make_tokenizer()), allow_nan=False))["sequences"]
    assert sequence["tokens"][0]["fused_logprob"] is None and sequence["tokens"][0]["fused"] == 0
    assert sequence["tokens"][0]["pilot_logprob"] < 0


def test_more_candidates_than_tokens() -> None:
    fused, _ = joined("llama")
    told = generated(fused, prompts()[:1], lam=1.0, explain=Explain(top_k=10_000), eos_token_id=END).explanation
    assert told.pilot_top.ids.shape[2] == told.fused_top.ids.shape[2] == 258
    torch.testing.assert_close(told.fused_top.fused.sum(2), torch.ones_like(told.fused_logprobs))
    with pytest.raises(ValueError, match="at least 1"):
        Explain(top_k=0)


# -- ways to end, streams -----------------------------------------------------------------------------------------


class EndRows(StoppingCriteria):
    """Ends the rows given after two, three, ... tokens."""

    def __init__(self, after: list[int], start: int) -> None:
        self.after, self.start = after, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] - self.start >= after for after in self.after])


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(beams: int) -> None:
    """After a stop string comes padding; where that is the end token, tokens alone do not say that it is padding."""
    fused, _ = joined("llama")
    tokenizer = make_tokenizer()
    search: dict[str, Any] = {"num_beams": beams} | ({"length_penalty": 0.0} if beams > 1 else {})  # short ones win
    free = generated(fused, prompts(), lam=LAM, eos_token_id=None, **search)[:, 12:]
    stop = next(t for t in free[0, 1:-1].tolist() if tokenizer.decode([t]).isascii())
    out = generated(
        fused,
        prompts(),
        lam=LAM,
        eos_token_id=END,
        pad_token_id=END,
        stop_strings=[tokenizer.decode([stop])],
        tokenizer=tokenizer,
        explain=True,
        **search,
    )
    ended = [tokens[-1] == stop for tokens in said(out)]
    assert any(ended) and all(stop not in tokens[:-1] for tokens in said(out))
    assert not all(ended)
    padding = out.sequences[:, 12:][~out.explanation.mask]
    assert len(padding) and bool((padding == END).all())


def test_criteria_of_the_caller() -> None:
    fused, _ = joined("llama")
    out = generated(fused, prompts(), stopping_criteria=[EndRows([2, 5, 3], 12)], eos_token_id=END, logprobs=True)
    assert out.completion_mask.sum(1).tolist() == [2, 5, 3]
    # given as the fourth positional argument, as transformers allows
    ids, mask = left_padded(prompts())
    again = fused.generate(
        ids, None, None, [EndRows([2, 5, 3], 12)], attention_mask=mask, max_new_tokens=7, do_sample=False, logprobs=True
    )
    assert torch.equal(again.completion_mask, out.completion_mask)
    close(again.fused_logprobs, out.fused_logprobs)


def test_padding_token_that_is_said() -> None:
    """The token 0 pads, and may be generated all the same: it counts before the end."""
    fused, _ = joined("t5")

    def favour(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 0] += 100.0
        return scores

    out = generated(fused, prompts(), logits_processor=[favour], eos_token_id=END, logprobs=True, lam=1.0)
    assert bool((out.sequences == 0).all()) and bool(out.completion_mask.all())
    assert bool((out.fused_logprobs < 0).all())


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


def test_streams_are_unchanged() -> None:
    fused, _ = joined("llama")
    stream, ids = Collect(), torch.tensor([prompts()[0]])
    out = fused.generate(ids, max_new_tokens=6, do_sample=False, streamer=stream, explain=True)
    assert stream.ended and stream.seen == out.sequences[0].tolist()
    assert out.explanation.tokens[0].tolist() == stream.seen[ids.shape[1] :]


def test_several_tokens_at_a_time() -> None:
    """Assisted decoding: the first call holds guessed tokens behind the prompt."""
    fused, _ = joined("llama")
    ids = torch.tensor([prompts()[0] * 3])
    given = {"max_new_tokens": 8, "do_sample": False, "lam": 2.0, "eos_token_id": None}
    plain = fused.generate(ids, explain=True, **given)
    guessed = fused.generate(ids, explain=True, prompt_lookup_num_tokens=3, **given)
    assert torch.equal(plain.sequences, guessed.sequences)
    close(guessed.explanation.fused_logprobs, plain.explanation.fused_logprobs)


def test_a_forced_beginning_of_the_target() -> None:
    """An encoder-decoder's decoder may be given more than its start token."""
    fused, _ = joined("t5")
    ids, mask = left_padded(prompts())
    out = fused.generate(
        ids,
        attention_mask=mask,
        decoder_input_ids=torch.tensor([[0, 40, 50], [0, 60, 70], [0, 80, 90]]),
        max_new_tokens=4,
        do_sample=False,
        lam=LAM,
        logprobs=True,
        output_logits=True,
        eos_token_id=None,
    )
    assert out.fused_logprobs.shape == (3, 4)
    close(out.fused_logprobs, seen_while_decoding(out, 3))


def test_a_mask_that_generate_makes_itself() -> None:
    """Without an attention mask transformers takes the padding tokens of the prompt for padding."""
    fused, _ = joined("llama")
    ids, mask = left_padded(prompts())
    given = {"max_new_tokens": 5, "do_sample": False, "logprobs": True, "lam": LAM}
    one, other = fused.generate(ids, **given), fused.generate(ids, attention_mask=mask, **given)
    assert torch.equal(one.sequences, other.sequences)
    assert torch.equal(one.fused_logprobs, other.fused_logprobs)


def test_a_prompt_in_chunks_is_refused() -> None:
    """The Copilot would begin behind the first chunk."""
    fused, _ = joined("llama")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        fused.generate(torch.tensor([prompts()[0]]), max_new_tokens=2, prefill_chunk_size=3)


def test_nothing_generated_cannot_be_explained() -> None:
    fused, _ = joined("llama")
    prompt = torch.tensor([prompts()[0]])
    empty = Completions(prompt, prompt > 0, prompt.shape[1], torch.tensor([0]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="no token was generated"):
        explain_completions(fused, empty, Explain())
