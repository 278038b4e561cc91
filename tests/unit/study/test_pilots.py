"""The mean of two Pilots and the temperature against slow references, one sequence and one token at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tc_ray.config.fusion import FusionSection
from tc_ray.data.encode.tokenize import completion_ids
from tc_ray.evaluation.rows import HeldOut, RowSet
from tc_ray.evaluation.scores import NLL
from tc_ray.evaluation.teacher_forced import NLL_FLOOR, Text
from tc_ray.study.pilots import TEMPERATURES, AveragedPilots, best_temperature, results_by, scaled_sums
from tests.support.tiny_model import make_tiny_llama, make_tokenizer

PROMPTS = [[5, 9, 30], [7, 8, 60, 61, 62], [40, 41]]
NEW = 6


@pytest.fixture(scope="module")
def pilots(tmp_path_factory: pytest.TempPathFactory) -> list[AutoModelForCausalLM]:
    folder = tmp_path_factory.mktemp("pilots")
    places = [make_tiny_llama(folder / str(seed), seed=seed, scale=6.0) for seed in (1, 2)]
    return [AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval() for place in places]


@torch.no_grad()
def slow_mean(pilots: list[AutoModelForCausalLM], ids: list[int]) -> torch.Tensor:
    """Mean probabilities of the token after `ids`."""
    return sum(pilot(torch.tensor([ids])).logits[0, -1].softmax(-1) for pilot in pilots) / 2


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def test_greedy_decoding_follows_the_mean(pilots: list[AutoModelForCausalLM]) -> None:
    ids, mask = padded(PROMPTS)
    made = AveragedPilots(*pilots).generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=1
    )
    alone = pilots[0].generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, prompt in enumerate(PROMPTS):
        wanted = list(prompt)
        while len(wanted) < len(prompt) + NEW and wanted[-1] != 1:
            wanted.append(int(slow_mean(pilots, wanted).argmax()))
        assert made[row, ids.shape[1] :].tolist()[: len(wanted) - len(prompt)] == wanted[len(prompt) :]
    assert not torch.equal(made, alone), "the second Pilot changes nothing here"


def test_beams_that_change_places_are_scored_by_the_mean(pilots: list[AutoModelForCausalLM]) -> None:
    ids, mask = padded(PROMPTS)
    out = AveragedPilots(*pilots).generate(
        *(ids,),
        attention_mask=mask,
        max_new_tokens=NEW,
        num_beams=3,
        do_sample=False,
        length_penalty=0.0,
        pad_token_id=0,
        eos_token_id=1,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, prompt in enumerate(PROMPTS):
        tokens, total = out.sequences[row, ids.shape[1] :].tolist(), 0.0
        so_far = list(prompt)
        for token in tokens:
            total += float(slow_mean(pilots, so_far)[token].log())
            so_far.append(token)
            if token == 1:
                break
        assert float(out.sequences_scores[row]) == pytest.approx(total, abs=1e-3)


def test_an_encoder_decoder_is_averaged_too() -> None:
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        models.append(T5ForConditionalGeneration(config).eval())
    ids, mask = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    made = AveragedPilots(*models).generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for row in range(2):
        source, decoded = ids[row : row + 1, : int(mask[row].sum())], [0]
        for _ in range(4):
            if decoded[-1] == 1:
                break
            with torch.no_grad():
                p = sum(
                    m(input_ids=source, decoder_input_ids=torch.tensor([decoded])).logits[0, -1].softmax(-1)
                    for m in models
                )
            decoded.append(int(p.argmax()))
        assert made[row].tolist()[: len(decoded)] == decoded


def texts() -> list[Text]:
    return [Text([5, 9, 30, 31, 32, 1], 3), Text([7, 8], 2), Text([40, 41, 42, 1], 2)]  # the second has no gold token


def slow_nll(p: Callable[[list[int]], torch.Tensor], text: Text) -> float:
    return sum(-float(p(text.ids[:at])[text.ids[at]].log()) for at in range(text.start, len(text.ids)))


def test_nll_of_the_mean_is_that_of_each_token_alone(pilots: list[AutoModelForCausalLM]) -> None:
    found = AveragedPilots(*pilots).sums(texts(), NLL_FLOOR)
    wanted = [slow_nll(lambda ids: slow_mean(pilots, ids), text) for text in texts()]
    assert found[:, NLL].tolist() == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def at(pilot: AutoModelForCausalLM, ids: list[int], temperature: float) -> torch.Tensor:
    return (pilot(torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1)


def test_the_temperature_is_the_best_of_the_list(pilots: list[AutoModelForCausalLM]) -> None:
    def nll(temperature: float) -> float:
        return sum(slow_nll(lambda ids: at(pilots[0], ids, temperature), text) for text in texts())

    found = best_temperature(pilots[0], texts())
    assert found == min(TEMPERATURES, key=nll) != 1.0
    scaled = scaled_sums(pilots[0], found)(texts(), NLL_FLOOR)
    assert scaled[:, NLL].sum() == pytest.approx(nll(found), abs=1e-3)


def test_without_gold_tokens_the_temperature_is_1(pilots: list[AutoModelForCausalLM]) -> None:
    assert best_temperature(pilots[0], texts()[1:2]) == 1.0


def held_out(tokenizer: PreTrainedTokenizerFast, options: tuple[str, ...] = ()) -> list[HeldOut]:
    made = []
    for number, (prompt, completion) in enumerate([("1+1=", "2"), ("20+2=", "22"), ("3+1=", "4")]):
        ids = tokenizer(prompt)["input_ids"]
        gold = completion_ids(completion, tokenizer)
        made.append(HeldOut(number, ids + gold, len(ids), completion, prompt, completion, options))
    return made


def test_exact_match_of_the_mean_is_scored_by_the_evaluations_metric(pilots: list[AutoModelForCausalLM]) -> None:
    tokenizer = make_tokenizer()
    rows = RowSet("test", "exact_match", held_out(tokenizer), "here")
    given = pilots[0].generation_config
    pilots[0].generation_config = GenerationConfig(repetition_penalty=50.0)  # the evaluation's batch knows none
    both = AveragedPilots(*pilots)
    said = both.said(rows, tokenizer, FusionSection(max_new_tokens=NEW, eval_batch_size=2), [])
    pilots[0].generation_config = given
    assert said is not None
    for row, text in zip(rows.rows, said, strict=True):
        ids = list(row.prompt_ids)
        while len(ids) < len(row.prompt_ids) + NEW and ids[-1] != 1:
            ids.append(int(slow_mean(pilots, ids).argmax()))
        assert text == tokenizer.decode(ids[len(row.prompt_ids) :], skip_special_tokens=True)
    results = results_by(rows, tokenizer, both.sums, said)
    assert [one.right for one in results] == [text == row.answer for row, text in zip(rows.rows, said, strict=True)]
    assert [one.tokens for one in results] == [2, 3, 2]


def test_options_are_ranked_by_the_mean(pilots: list[AutoModelForCausalLM]) -> None:
    tokenizer, options = make_tokenizer(), ("2", "22", "4")
    rows = RowSet("test", "choice", held_out(tokenizer, options), "here", option_by="token")
    both = AveragedPilots(*pilots)
    assert both.said(rows, tokenizer, FusionSection(), []) is None
    for row, found in zip(rows.rows, results_by(rows, tokenizer, both.sums, None), strict=True):
        scores = []
        for option in options:
            ids = completion_ids(option, tokenizer)
            text = Text(row.prompt_ids + ids, row.target_start)
            scores.append(-slow_nll(lambda ids: slow_mean(pilots, ids), text) / len(ids))
        assert found.said == options[scores.index(max(scores))]
        assert found.right == (found.said == row.answer)
