"""Newer Copilots in a replica without Serve: real engines, real files, requests under way while they are swapped."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tc_ray.export.check import copilot_version
from tc_ray.serving.deploy.replica import Replica
from tc_ray.serving.engine import Finished, GenerationRequest
from tc_ray.serving.errors import ServingError
from tc_ray.serving.models import loading
from tc_ray.serving.models import swap as reload
from tc_ray.serving.models.loading import ExportChanged, LoadedRun
from tc_ray.serving.settings import EngineLimits, ModelSettings, ReplicaSettings
from tests.support.serving_samples import Collector, make_export

PROMPT = tuple(range(10, 30))


@dataclass
class Bench:
    """A replica of one model `m`, which looks for newer Copilots only when told."""

    replica: Replica
    export: Path

    @property
    def version(self) -> str | None:
        return self.replica.catalogue.find("m").copilot_version

    def say(self, new_tokens: int = 12) -> tuple[list[int], Finished]:
        collector = Collector(self.replica.catalogue.find("m").engine, GenerationRequest(PROMPT, new_tokens, lam=5.0))
        return finish(collector)


def finish(collector: Collector) -> tuple[list[int], Finished]:
    _, end = collector.all()
    assert isinstance(end, Finished), end
    return [token.id for token in collector.tokens], end


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("made"), positions=4096)


@pytest.fixture
def bench(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(reload, "SETTLE_S", 0.05)
    monkeypatch.setattr(reload, "RETIRE_AFTER_S", 0.2)
    export = tmp_path / "run/export"
    shutil.copytree(made, export)
    limits = EngineLimits(max_running=4, cache_bytes=2**26)
    settings = ReplicaSettings((ModelSettings("m", str(export)),), engine=limits, threads=1, watch_s=None, drain_s=60)
    replica = Replica(settings)
    yield Bench(replica, export)
    replica.reloader.close()
    for served in replica.catalogue:
        served.engine.close()


def train(export: Path, seed: int = 1) -> None:
    """Another Copilot in place of the one that is there."""
    weights = export / "copilot/model.safetensors"
    tensors = load_file(weights)
    generator = torch.Generator().manual_seed(seed)
    tensors["output.weight"] = torch.randn(tensors["output.weight"].shape, generator=generator)
    save_file(tensors, weights, metadata={"format": "pt"})


def test_newer_copilot_takes_over_and_requests_under_way_end_with_the_old_one(bench: Bench) -> None:
    before, first = bench.version, bench.replica.catalogue.find("m")
    expected, _ = bench.say(300)
    under_way = Collector(first.engine, GenerationRequest(PROMPT, 300, lam=5.0))
    under_way.next()
    train(bench.export)
    assert bench.replica.reloader.look() == ["m"]
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
    pilot = bench.replica.reloader._current
    [loaded] = pilot.values()
    layer = loaded.model.pilot.model.layers[0]
    for seed in (1, 2, 3):
        train(bench.export, seed)
        assert bench.replica.reloader.look() == ["m"]
    until = time.monotonic() + 20
    while len(layer._forward_hooks) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(layer._forward_hooks) == 1


def test_nothing_happens_without_a_change(bench: Bench) -> None:
    engine = bench.replica.catalogue.find("m").engine
    assert bench.replica.reloader.look() == []
    fusion = bench.export / "fusion.json"
    fusion.write_text(fusion.read_text())  # written anew, the same content
    assert bench.replica.reloader.look() == []
    assert bench.replica.catalogue.find("m").engine is engine


def test_changed_lambda_takes_over(bench: Bench) -> None:
    fusion = bench.export / "fusion.json"
    fusion.write_text(json.dumps({**json.loads(fusion.read_text()), "lam": 0.25}))
    assert bench.replica.reloader.look() == ["m"]
    assert bench.replica.catalogue.find("m").default_lam == 0.25


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
        (gone, "lacks files"),
        (empty_fusion, "not valid JSON"),
    ],
)
def test_copilot_that_cannot_be_used_is_told_once_and_changes_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture, harm: object, words: str
) -> None:
    assert callable(harm)
    before, tokens = bench.version, bench.say()[0]
    harm(bench.export)
    with caplog.at_level(logging.INFO, "tc_ray.serving"):
        assert bench.replica.reloader.look() == []
        assert bench.replica.reloader.look() == []
    [line] = [record.getMessage() for record in caplog.records if record.name == "tc_ray.serving"]
    assert words in line and f"{before} goes on serving" in line
    assert (bench.version, bench.say()[0]) == (before, tokens)


def test_a_broken_copilot_is_followed_by_a_sound_one(bench: Bench, made: Path) -> None:
    cut(bench.export)
    assert bench.replica.reloader.look() == []
    shutil.copy(made / "copilot/model.safetensors", bench.export / "copilot/model.safetensors")
    train(bench.export)
    assert bench.replica.reloader.look() == ["m"]
    assert bench.version == copilot_version(bench.export)


def test_user_config_names_another_folder(bench: Bench, made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/export"
    shutil.copytree(made, other)
    train(other)
    bench.replica.configure({"copilots": {"m": str(other.parent)}})
    assert bench.version == copilot_version(other)
    assert asyncio.run(bench.replica.unhealthy()) is None
    bench.replica.configure({"copilots": {}})
    assert bench.replica.reloader.look() == ["m"], "a replica that serves loads it in the background"
    assert bench.version == copilot_version(bench.export)


def test_a_changed_reload_makes_the_server_look_at_once(bench: Bench) -> None:
    """However seldom it looks by itself."""
    before, watched = bench.version, bench.replica.reloader
    bench.replica.configure({"reload": 1})
    assert asyncio.run(bench.replica.unhealthy()) is None
    watched._watch_s = 3600.0
    watched.start()
    time.sleep(0.3)
    train(bench.export)
    time.sleep(0.3)
    assert bench.version == before, "it looked by itself: the test shows nothing"
    bench.replica.configure({"reload": 2})
    until = time.monotonic() + 30
    while bench.version == before and time.monotonic() < until:
        time.sleep(0.05)
    assert bench.version == copilot_version(bench.export) != before


@pytest.mark.parametrize(
    ("user_config", "words"),
    [
        ([], "may hold `copilots`"),
        ({"copilot": {}}, "may hold `copilots`"),
        ({"copilots": {"other": "x"}}, "must map names of served models"),
        ({"copilots": {"m": "absent"}}, "is no folder"),
    ],
)
def test_user_config_that_cannot_be_meant(
    bench: Bench, caplog: pytest.LogCaptureFixture, user_config: object, words: str
) -> None:
    with pytest.raises(ServingError, match=words):
        bench.replica.configure(user_config)
    # Serve gives no user_config at the start where there is none, and asks for health before it sends requests
    assert asyncio.run(bench.replica.unhealthy()) is None
    with caplog.at_level(logging.ERROR, "tc_ray.serving"):
        bench.replica.configure(user_config)  # of a replica that serves already: told, and no more
    assert words in caplog.text
    assert bench.say()


def test_copilot_that_is_being_written_at_the_start_is_waited_for(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SETTLE_PAUSE_S", 0.01)
    read, tries = LoadedRun._read, []

    def changing(run: LoadedRun, source: Path) -> Any:
        tries.append(source)
        if len(tries) < settles:
            raise ExportChanged
        return read(run, source)

    monkeypatch.setattr(LoadedRun, "_read", changing)
    settings = ReplicaSettings((ModelSettings("m", str(made)),), threads=1, watch_s=None)
    settles = 3
    replica = Replica(settings)
    replica.catalogue.find("m").engine.close()
    assert len(tries) == 3
    settles = 1000
    with pytest.raises(ServingError, match="still being written"):
        Replica(settings)


def test_watch_sees_a_change_by_itself(bench: Bench) -> None:
    before = bench.version
    bench.replica.reloader._watch_s = 0.1
    bench.replica.reloader.start()
    done = threading.Event()
    train(bench.export)
    until = time.monotonic() + 30
    while bench.version == before and time.monotonic() < until:
        done.wait(0.05)
    assert bench.version == copilot_version(bench.export) != before
