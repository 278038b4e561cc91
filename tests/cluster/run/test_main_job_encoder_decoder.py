"""The main job with an encoder-decoder Pilot: the same run, a log with the encoder's output, a sequence-to-sequence export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from tc_ray.config.schema import RunConfig
from tc_ray.evaluation.decode import read_held_out
from tc_ray.mistakelog.read.reader import MistakeLog
from tc_ray.models.fusion import FusedModel
from tc_ray.run.job import JobError, JobResult, run_job
from tests.support.local_ray import local_ray
from tests.support.tiny_model import make_tokenizer
from tests.support.tiny_run import assert_log_is_exact, tiny_config

ROUNDS = 10


def make_tiny_t5(folder: Path) -> Path:
    """Random T5 with a shared embedding (d 32, 2 encoder and 3 decoder blocks) and the byte tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


cluster = local_ray(cpus=3)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("job")
    make_tiny_t5(folder / "model")
    return tiny_config(folder, log__positions="target", log__top_k=8, resources__pilot_workers=2)


def test_the_log_holds_the_encoder_s_output(config: RunConfig, result: JobResult) -> None:
    assert_log_is_exact(config, ROUNDS, rows=96)
    log = MistakeLog(config.run.path / "log")
    assert (log.metadata.question, log.metadata.positions) == ("states", "target")
    records = log.records(rounds=(1, 1))
    records.validate()
    assert records.question is not None and len(records.question) == records.target_start.sum()
    # the states of a round are those of the weights it began with: round 1 has the model's own
    pilot = T5ForConditionalGeneration.from_pretrained(config.run.path.parent / "model").eval()
    row = records.select([0])
    with torch.no_grad():
        plain = pilot.get_encoder()(torch.from_numpy(row.input_ids[None, : row.target_start[0]]).long())[0]
    stored = torch.from_numpy(row.question.view(np.int16)).view(torch.bfloat16).float()
    # training runs with dropout 0.1, so they agree in direction, not in digits
    cosine = torch.nn.functional.cosine_similarity(stored, plain[0])
    assert float(cosine.mean()) > 0.8
    assert np.isfinite(records.token_loss).all()


def test_the_export_decodes(config: RunConfig, result: JobResult) -> None:
    assert result.export is not None and result.report is not None
    fused = FusedModel.from_pretrained(result.export)
    assert fused.config.is_encoder_decoder
    tokenizer = AutoTokenizer.from_pretrained(result.export / "pilot")
    example = read_held_out(config.run.path / "data" / "test.parquet", 1)[0]
    assert example.prompt_ids[-1] == tokenizer.eos_token_id
    ids = torch.tensor([example.prompt_ids])
    made = fused.generate(ids, max_new_tokens=5, do_sample=False, lam=0.5, num_beams=3)
    assert made[0, 0] == fused.config.decoder_start_token_id and made.shape[1] <= 6
    with torch.no_grad():  # attention has another kernel where gradients are kept
        out = fused.pilot(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits
    assert torch.equal(fused(ids, lam=0.0).logits, out)
    plain = T5ForConditionalGeneration.from_pretrained(result.export / "pilot")
    for (name, one), other in zip(plain.named_parameters(), fused.pilot.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_states_of_every_position_are_refused(tmp_path: Path) -> None:
    make_tiny_t5(tmp_path / "model")
    with pytest.raises(JobError, match=r"set log\.positions=target"):
        run_job(tiny_config(tmp_path))
