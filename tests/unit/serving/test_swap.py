"""Newer Copilots in a replica without Serve: real engines, real files, requests in progress while they are swapped."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_ray.config.serving import ServingSection
from tc_ray.export.check import copilot_version
from tc_ray.serving.deploy.replica import Replica
from tc_ray.serving.deploy.settings import ReplicaSettings
from tc_ray.serving.engine.contract import Finished, GenerationRequest
from tests.support.serving_samples import Collector, make_export

PROMPT = tuple(range(10, 30))


@dataclass
class Bench:
    """A replica of one model `m`, which serves already."""

    replica: Replica
    export: Path

    @property
    def version(self) -> str | None:
        return self.replica.registry.find("m").copilot_version

    def reload(self) -> bool:
        """As Serve's reconfigure: load the Copilots again; whether the served model was replaced."""
        before = self.replica.registry.find("m")
        self.replica.reload()
        self.replica._swaps.submit(lambda: None).result(60)
        return self.replica.registry.find("m") is not before

    def say(self, new_tokens: int = 12) -> tuple[list[int], Finished]:
        collector = Collector(self.replica.registry.find("m").engine, GenerationRequest(PROMPT, new_tokens, lam=5.0))
        return finish(collector)


def finish(collector: Collector) -> tuple[list[int], Finished]:
    _, end = collector.all()
    assert isinstance(end, Finished), end
    return [token.id for token in collector.tokens], end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("made"), positions=4096)


@pytest.fixture
def bench(made: Path, tmp_path: Path) -> Iterator[Bench]:
    export = tmp_path / "run/export"
    shutil.copytree(made, export)
    section = ServingSection(max_running=4, cache_bytes=2**26, threads=1, request_timeout_s=60, drain_s=60)
    replica = Replica(ReplicaSettings({"m": export}, section))
    assert asyncio.run(replica.registry.unhealthy()) is None
    yield Bench(replica, export)
    for served in replica.registry:
        served.engine.close()


def train(export: Path, seed: int = 1) -> None:
    """Another Copilot in place of the one that is there."""
    weights = export / "copilot/model.safetensors"
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(seed)
    tensors["output.weight"] = torch.randn(tensors["output.weight"].shape, generator=generator)
    save_file(tensors, weights, metadata={"format": "pt"})


def test_newer_copilot_takes_over_and_requests_under_way_end_with_the_old_one(bench: Bench) -> None:
    before, first = bench.version, bench.replica.registry.find("m")
    expected, _ = bench.say(300)
    under_way = Collector(first.engine, GenerationRequest(PROMPT, 300, lam=5.0))
    under_way.next()
    train(bench.export)
    assert bench.reload()
    assert bench.version == copilot_version(bench.export) != before
    tokens, end = finish(under_way)
    assert tokens == expected and end.completion_tokens == 300
    later, _ = bench.say()
    assert later != expected[:12]
    until = time.monotonic() + 20
    while first.engine.unhealthy() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert first.engine.unhealthy() == "the engine has stopped"
    assert bench.say()[0] == later  # the Pilot is none the worse for the old Copilot's leaving


def test_hooks_of_old_copilots_leave_the_pilot(bench: Bench) -> None:
    layer = bench.replica.registry.find("m").engine.model.pilot.model.layers[0]
    for seed in (1, 2, 3):
        train(bench.export, seed)
        assert bench.reload()
    until = time.monotonic() + 20
    while len(layer._forward_hooks) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(layer._forward_hooks) == 1


def test_nothing_happens_without_a_change(bench: Bench) -> None:
    engine = bench.replica.registry.find("m").engine
    assert not bench.reload()
    fusion = bench.export / "fusion.json"
    fusion.write_text(fusion.read_text())  # written again, the same content
    assert not bench.reload()
    assert bench.replica.registry.find("m").engine is engine


def test_changed_lambda_takes_over(bench: Bench) -> None:
    fusion = bench.export / "fusion.json"
    fusion.write_text(json.dumps({**json.loads(fusion.read_text()), "lam": 0.25}))
    assert bench.reload()
    assert bench.replica.registry.find("m").default_lam == 0.25


def cut(export: Path) -> None:
    weights = export / "copilot/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def misfit(export: Path) -> None:
    config = export / "copilot/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pilot_hidden_size": 64}))


def other_tokenizer(export: Path) -> None:
    config = export / "copilot/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer": "0123456789abcdef"}))


def other_pilot(export: Path) -> None:
    train(export)
    weights = export / "pilot/model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})


def gone(export: Path) -> None:
    shutil.rmtree(export / "copilot")


def empty_fusion(export: Path) -> None:
    (export / "fusion.json").write_text("")


def weight_of(value: float | None) -> Callable[[Path], None]:
    """A weight of the Copilot set to a value; None: its tensor is left out."""

    def harm(export: Path) -> None:
        weights = export / "copilot/model.safetensors"
        tensors = load_file(weights)
        if value is None:
            del tensors["output.weight"]
        else:
            tensors["output.weight"].view(-1)[7] = value
        save_file(tensors, weights, metadata={"format": "pt"})

    return harm


def fusion_lam(value: Any) -> Callable[[Path], None]:
    def harm(export: Path) -> None:
        settings = json.loads((export / "fusion.json").read_text())
        (export / "fusion.json").write_text(json.dumps(settings | {"lam": value}))

    return harm


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        # faults 5, 6 and 15: these were swapped in and served as healthy
        (weight_of(float("nan")), "output.weight holds numbers that are not finite"),
        (weight_of(float("-inf")), "output.weight holds numbers that are not finite"),
        (weight_of(1e30), "predicts errors of size"),
        (weight_of(None), "lacks weights of its model: output.weight"),
        (fusion_lam(float("nan")), "lambda must be a number from 0 to 10"),
        (fusion_lam(11), "lambda must be a number from 0 to 10"),
        (fusion_lam(True), "lambda must be a number from 0 to 10"),
        (cut, "cannot be loaded"),
        (misfit, "made for a Pilot of width 64"),
        (other_tokenizer, "another tokenizer"),
        (other_pilot, "another Pilot"),
        (gone, "holds a Pilot alone"),
        (empty_fusion, "fusion.json missing"),
    ],
)
def test_copilot_that_cannot_be_used_is_reported_and_changes_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture, harm: object, words: str
) -> None:
    assert callable(harm)
    before, tokens = bench.version, bench.say()[0]
    harm(bench.export)
    with caplog.at_level(logging.INFO, "tc_ray.serving"):
        assert not bench.reload()
    [line] = [record.getMessage() for record in caplog.records if record.name == "tc_ray.serving"]
    assert words in line and f"{before} goes on serving" in line
    assert (bench.version, bench.say()[0]) == (before, tokens)


def test_a_broken_copilot_is_followed_by_a_sound_one(bench: Bench, made: Path) -> None:
    cut(bench.export)
    assert not bench.reload()
    shutil.copy(made / "copilot/model.safetensors", bench.export / "copilot/model.safetensors")
    train(bench.export)
    assert bench.reload()
    assert bench.version == copilot_version(bench.export)
