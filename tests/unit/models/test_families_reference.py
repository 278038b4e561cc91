"""The reference itself against transformers: what stands on it is only as good as this.

Tolerance 1e-5 relative to the largest entry: both sides are float32 and add the same numbers in another order.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import family_layers
from tests.support.family_layers import decoder_layer, final_norm, layer_types, position_bias, t5_block
from tests.support.family_reference import Fusion, Made, beam_search, dense_errors, greedy, pilot_pass, pooled
from tests.support.reference_samples import close
from tests.support.tiny_families import (
    DECODER_ONLY,
    ENCODER_DECODER,
    END,
    FAMILIES,
    VOCAB,
    load,
    make_narrow,
    make_pilot,
)

PROMPT = [40, 2, 177, 200, 33, 8, 250, 91, 17]
TARGET = [61, 99, 3, 204, 150, 150, 31, 7, 88, 240, 12]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The Pilot and the narrow base of every family."""
    folder = tmp_path_factory.mktemp("families")
    return {
        family: [load(make_pilot(family, folder / family)), load(make_narrow(family, folder / f"{family}-narrow"))]
        for family in FAMILIES
    }


@pytest.mark.parametrize("family", DECODER_ONLY)
@torch.no_grad()
def test_layers_of_decoder_only_families(models: dict[str, list[Any]], family: str) -> None:
    for model in models[family]:
        ids = torch.tensor([PROMPT + TARGET])
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
        decoder, x = model.get_decoder(), out.hidden_states[0][0]
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for number, (layer, kind) in enumerate(zip(decoder.layers, layer_types(model.config), strict=True), start=1):
            x = decoder_layer(layer, model.config, kind, x, None, causal)
            if number < len(decoder.layers):
                close(x, out.hidden_states[number][0])
        close(final_norm(decoder.norm, model.config, x), out.hidden_states[-1][0])


@pytest.mark.parametrize("family", ENCODER_DECODER)
@torch.no_grad()
def test_blocks_of_encoder_decoder_families(models: dict[str, list[Any]], family: str) -> None:
    for model in models[family]:
        given = torch.tensor([[0, *TARGET, *TARGET]])
        out = model(
            input_ids=torch.tensor([PROMPT]), decoder_input_ids=given, use_cache=False, output_hidden_states=True
        )
        decoder, x = model.get_decoder(), out.decoder_hidden_states[0][0]
        question = out.encoder_last_hidden_state[0]
        bias = position_bias(
            decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, given.shape[1], model.config
        )
        sees = torch.ones(given.shape[1], len(PROMPT), dtype=torch.bool)
        for number, block in enumerate(decoder.block, start=1):
            x = t5_block(block, model.config, x, question, bias, sees)
            if number < len(decoder.block):
                close(x, out.decoder_hidden_states[number][0])
        close(final_norm(decoder.final_layer_norm, model.config, x), out.decoder_hidden_states[-1][0])


# what each family has that others have not: (family, attribute of the config, value that takes it away)
SPECIAL = [
    ("mistral", "sliding_window", None),
    ("qwen2_sliding", "layer_types", ["full_attention"] * 4),
    ("gemma2", "layer_types", ["full_attention"] * 4),
    ("gemma2", "attn_logit_softcapping", 1e6),
    ("gemma2", "query_pre_attn_scalar", 16),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma3", "layer_types", ["full_attention"] * 4),
    ("gemma3", "query_pre_attn_scalar", 12),
    ("llama3", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    ("t5", "scale_decoder_outputs", False),
    ("t5", "relative_attention_max_distance", 1000),
]


@pytest.mark.parametrize(("family", "name", "value"), SPECIAL, ids=[f"{f}-{n}" for f, n, _ in SPECIAL])
@torch.no_grad()
def test_what_is_special_matters_in_the_tiny_model(
    models: dict[str, list[Any]], tmp_path: Path, family: str, name: str, value: Any
) -> None:
    """Else a test that passes on the tiny model would prove nothing about it."""
    model = models[family][0]
    config = type(model.config).from_dict(model.config.to_dict())
    setattr(config, name, value)
    other = type(model).from_pretrained(None, config=config, state_dict=model.state_dict()).eval()
    logits = [pilot_logits(m) for m in (model, other)]
    assert float((logits[0] - logits[1]).abs().max()) > 0.3


def pilot_logits(model: Any) -> torch.Tensor:
    if model.config.is_encoder_decoder:
        given = torch.tensor([[0, *TARGET]])
        return model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=given).logits
    return model(input_ids=torch.tensor([PROMPT + TARGET])).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_pilots_are_like_trained_ones(models: dict[str, list[Any]], family: str) -> None:
    """Sure of some tokens and not of others, and not repeating what they read."""
    logits = pilot_pass(models[family][0], PROMPT, TARGET).logits
    likeliest = logits.softmax(-1).max(-1).values
    assert 0.15 < float(likeliest.mean()) < 0.8
    assert len(set(logits.argmax(-1).tolist())) >= len(TARGET) // 2


def test_distance_buckets_are_the_library_s() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    for buckets, furthest in ((8, 20), (32, 128)):
        back = torch.arange(200)
        theirs = T5Attention._relative_position_bucket(
            -back, bidirectional=False, num_buckets=buckets, max_distance=furthest
        )
        ours = [family_layers.distance_bucket(d, buckets, furthest) for d in back.tolist()]
        assert theirs.tolist() == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_pass_of_the_pilot(models: dict[str, list[Any]], family: str) -> None:
    """A longer target adds rows and changes none; row_positions says where rows come from."""
    model = models[family][0]
    long, short = pilot_pass(model, PROMPT, TARGET), pilot_pass(model, PROMPT, TARGET[:4])
    close(long.logits[:5], short.logits)
    close(long.states[: len(short.states)], short.states)
    assert long.row_positions() == list(range(len(PROMPT) - 1, len(PROMPT) + len(TARGET)))
    errors = dense_errors(long.logits, TARGET)
    assert errors.shape == (len(TARGET), VOCAB)
    assert float(errors.sum(1).abs().max()) < 1e-5
    for pooling in ("mean", "max", "sum"):
        close(pooled(long.layers, pooling), pilot_pass(model, PROMPT, TARGET, pooling).states, 1e-6)
    stacked = long.layers
    close(pooled(stacked, "max"), stacked.amax(0), 0.0)
    close(pooled(stacked, "sum"), stacked.sum(0), 1e-6)
    close(pooled(stacked, "mean"), stacked.mean(0), 1e-6)


def plain(model: Any) -> Fusion:
    """The Pilot alone."""
    return Fusion(model, None, Made(model, model, ()), lam=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_of_the_pilot_alone(models: dict[str, list[Any]], family: str) -> None:
    model = models[family][0]
    out = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0].tolist()
    made = out[1:] if model.config.is_encoder_decoder else out[len(PROMPT) :]
    assert greedy(plain(model), PROMPT, 8, END) == made


@pytest.mark.parametrize(
    ("family", "length_penalty", "ends_at"),
    [("llama", 1.0, 3), ("llama", 2.0, 3), ("llama", 0.0, 2), ("gemma2", 0.0, 2), ("t5", 0.0, 0)],
)
def test_beam_search_of_the_pilot_alone(
    models: dict[str, list[Any]], family: str, length_penalty: float, ends_at: int
) -> None:
    """With a likely token as end token, so that hypotheses of unlike lengths compete."""
    model = models[family][0]
    fusion = plain(model)
    end = greedy(fusion, PROMPT, 4)[ends_at]
    wanted = beam_search(
        lambda tokens: fusion.logits(PROMPT, tokens)[-1].log_softmax(-1),
        beams=3,
        steps=7,
        end=end,
        length_penalty=length_penalty,
    )
    out = model.generate(
        torch.tensor([PROMPT]),
        max_new_tokens=7,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        eos_token_id=end,
        length_penalty=length_penalty,
        return_dict_in_generate=True,
        output_scores=True,
    )
    skipped = 1 if model.config.is_encoder_decoder else len(PROMPT)
    found = [row[skipped:].tolist() for row in out.sequences]
    assert len({len(tokens) for _, tokens in wanted}) > 1, "all of one length: the penalty is not tested"
    for (score, tokens), row, theirs in zip(wanted, found, out.sequences_scores.tolist(), strict=True):
        assert row[: len(tokens)] == tokens and set(row[len(tokens) :]) <= {end}  # filled up with its end token
        assert math.isclose(score, theirs, rel_tol=1e-5)
