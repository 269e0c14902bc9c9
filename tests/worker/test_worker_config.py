from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshlm.chassis.config import ConfigError, Source
from meshlm.worker.config import WorkerConfig
from meshlm.worker.engine.scheduler import SchedulerSettings
from meshlm.worker.fake import FakeSettings
from meshlm.worker.main import build


def read(**worker: Any) -> WorkerConfig:
    return Source({"worker": worker}, {}).section("worker", WorkerConfig)


def test_a_fake_engine_serves_only_where_the_config_names_it() -> None:
    with pytest.raises(ConfigError, match=r"worker: model_path is required"):
        read()
    assert read(engine="fake").model_name == "fake"


def test_a_scheduler_that_leaves_no_room_for_prompts_is_refused_by_its_full_path() -> None:
    with pytest.raises(ConfigError, match=r"worker\.scheduler: step_tokens"):
        read(engine="fake", scheduler={"max_running": 400})
    config = read(engine="fake", scheduler={"max_running": 4, "chunk_tokens": 8, "step_tokens": 12})
    assert config.scheduler == SchedulerSettings(max_running=4, chunk_tokens=8, step_tokens=12)


def test_a_model_is_named_after_its_file_or_folder() -> None:
    assert read(model_path="/models/SmolLM2-135M-Instruct.Q4_1.gguf").model_name == "SmolLM2-135M-Instruct.Q4_1"
    assert read(model_path="/models/llama-3.2").model_name == "llama-3.2"
    assert read(model_path="/models/x.gguf", model="small").model_name == "small"


def test_the_engine_process_can_read_what_the_config_says_of_the_runner() -> None:
    config = read(engine="fake", fake={"total_blocks": 7, "step_seconds": 1})
    assert msgspec.convert(config.runner, FakeSettings) == FakeSettings(total_blocks=7, step_seconds=1.0)
    load = pytest.importorskip("meshlm.worker.engine.load")
    given = read(model_path="/models/x.gguf", threads=2, kv_blocks=9).runner
    settings = msgspec.convert(given, load.RunnerSettings, dec_hook=lambda kind, value: kind(value))
    assert (settings.model, settings.threads, settings.kv_blocks) == (Path("/models/x.gguf"), 2, 9)
    assert set(given) == {field.name for field in msgspec.inspect.type_info(load.RunnerSettings).fields}  # type: ignore[union-attr]


def test_what_is_in_force_can_be_shown() -> None:
    _, server, describe = build(Source({"worker": {"engine": "fake", "server": {"listen": "unix:/tmp/w"}}}, {}))
    assert server.listen == "unix:/tmp/w"
    assert describe()["worker"]["scheduler"]["max_waiting"] == 256


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"block_size": 12}, "block_size must be a power of two"),
        ({"kv_blocks": 0}, "kv_blocks and threads must be at least 1"),
        ({"threads": 0}, "kv_blocks and threads must be at least 1"),
        ({"max_context": 1}, "max_context must be at least 2"),
    ],
)
def test_sizes_that_cannot_serve_are_refused_before_an_engine_starts(wrong: dict[str, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(model_path="/models/x.gguf", **wrong)
