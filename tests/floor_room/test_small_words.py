"""What a user types who comes from elsewhere, or types almost the right thing."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from sffn_dist.launch import checks, cli, environment, ports
from sffn_dist.spec import machine
from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.config_keys import key_fields
from sffn_dist.spec.device_peaks import peak_flops, peak_link, peak_memory
from sffn_dist.spec.key_aliases import ALIASES
from sffn_dist.spec.loading import load
from sffn_dist.spec.plan import plan, render

SMALL = {
    "model": {"layers": 2, "width": 32, "heads": 4, "sequence": 16, "vocab": 256},
    "train": {"steps": 10, "global_batch_size": 4, "micro_batch_size": 4},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        load(path, overrides)
    return list(refusal.value.problems)


def test_keys_of_other_frameworks(path: Path) -> None:
    assert set(ALIASES.values()) <= set(key_fields())
    for word, key in (("train.lr=1", "train.learning_rate"), ("hidden_size=1", "model.width")):
        assert problems(path, word) == [f"{word[:-2]}: unknown key; the nearest known one is {key}"]
    assert problems(path, "optimizer.max-steps=3") == [
        "optimizer.max-steps: unknown key; the nearest known one is train.steps"
    ]


@pytest.mark.parametrize(
    ("override", "end"),
    [
        ("train.steps=1e4", "; write 10000"),
        ("train.steps=10_000", "; write 10000"),
        ("parallel.sequence=True", "; write true"),
        ("model.bias=no", "; write false"),
        ("ffn.rank=None", "; write null"),
        ("train.steps=1.5", "integer"),
        ("train.steps=many", "integer"),
    ],
)
def test_how_a_value_is_written(path: Path, override: str, end: str) -> None:
    (problem,) = problems(path, override)
    assert problem.endswith(end) or (end == "integer" and "; write" not in problem)


def test_home_is_home(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(
        path,
        ["run.dir=~/r", "data.dir=~/d", "data.source=~/s", "data.tokenizer=~/t.json", "init_from=~/i"],
    )
    found = (
        config.run.dir,
        config.data.dir,
        config.data.source,
        config.data.tokenizer,
        config.init_from.path,
    )
    assert found == tuple(f"/home/somebody/{name}" for name in ("r", "d", "s", "t.json", "i"))


def test_checkpoints_that_are_kept_for_good(path: Path) -> None:
    """Only what is saved can be kept."""
    config = load(path, ["checkpoint.interval=300", "checkpoint.keep_every=1000"])
    assert "every 300 steps; 2 kept, and every 3000 steps for good" in render(plan(config, 1))
    config = load(path, ["checkpoint.interval=0", "checkpoint.keep_every=1000"])
    page = render(plan(config, 1))
    assert "for good" not in page
    assert "checkpoint.keep_every: checkpoint.interval = 0 saves at the end alone" in page


def test_half_a_launcher() -> None:
    for variables in ({"WORLD_SIZE": "2"}, {"RANK": "0"}, {"RANK": "1", "WORLD_SIZE": "2"}):
        with pytest.raises(ConfigError, match="must be set too; start the ranks with deepspeed") as refusal:
            environment.check_variables(dict(variables))
        assert "MASTER_PORT" in refusal.value.problems[0]
    environment.check_variables({"WORLD_SIZE": "1"})
    environment.check_variables({})


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ports.RendezvousError, match=f"MASTER_PORT = {port}: is in use .*--master_port"):
            ports.check_port({"RANK": "0", "MASTER_PORT": port})
        ports.check_port({"RANK": "1", "MASTER_PORT": port})
        ports.check_port({"RANK": "0", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    ports.check_port({"RANK": "0", "MASTER_PORT": port})


@pytest.mark.parametrize(
    ("overrides", "capability", "expected"),
    [
        ([], (9, 0), None),
        (["parallel.tensor=2"], (9, 0), "1"),
        (["parallel.tensor=2"], None, "1"),
        (["parallel.tensor=2", "zero.stage=2"], (9, 0), None),
        (["parallel.tensor=2"], (10, 0), None),
    ],
)
def test_one_queue_where_it_helps_before_the_driver_is_asked(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    capability: tuple[int, int] | None,
    expected: str | None,
) -> None:
    """The driver reads the variable once; kernels=triton asks it for devices while the config is checked."""
    seen = []

    def ask(ranks: object = None) -> str:
        seen.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        return "no device"

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(machine, "compute_capability", lambda: capability)
    monkeypatch.setattr(machine, "triton_unavailable", ask)
    monkeypatch.setattr(cli, "started_ranks", lambda otherwise: 2)
    options = cli.arguments(
        ["--config", str(path), "kernels=triton", "train.micro_batch_size=2", "model.vocab=300", *overrides]
    )
    with pytest.raises(ConfigError, match="kernels = triton: no device"):
        cli.load_config(options)
    assert seen == [expected]
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


def test_variables_that_are_set_stay(path: Path) -> None:
    config = load(path, ["run.dir=/r"])
    given = {"PYTORCH_CUDA_ALLOC_CONF": "x", "TORCH_FR_BUFFER_SIZE": "1"}
    environ: dict[str, str] = {}
    environment.set_driver_variables(config, environ)
    assert environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"] == "/r/nccl_trace_rank_"
    environment.set_driver_variables(config, given)
    assert "PYTORCH_ALLOC_CONF" not in given
    assert given["TORCH_FR_BUFFER_SIZE"] == "1"


def test_a_build_for_amd_devices_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "2.13.0+rocm7.1")
    with pytest.raises(ConfigError, match="torch is a ROCm build"):
        checks.check_machine(load(path, []))


def test_cores_are_shared_by_the_ranks_that_may_use_them() -> None:
    eight = frozenset(range(8))
    assert machine.core_shares([("a", eight)] * 4 + [("b", eight)]) == [2, 2, 2, 2, 8]
    bound = [("a", frozenset(range(4 * rank, 4 * rank + 4))) for rank in range(8)]
    assert machine.core_shares(bound) == [4] * 8, "a mask of each task is not divided again"
    assert machine.core_shares([("a", frozenset({0}))] * 3) == [1, 1, 1]
    assert machine.core_shares([("a", frozenset({0, 1, 2})), ("a", frozenset({2, 3}))]) == [2, 1]


@pytest.mark.parametrize(
    ("device", "flops"),
    [
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_peaks(device: str, flops: float) -> None:
    assert peak_flops(device, "bf16") == flops
    assert peak_memory(device)
    assert peak_link(device)
