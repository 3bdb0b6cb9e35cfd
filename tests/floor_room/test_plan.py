"""The plan: what it promises, that it is JSON, and that bad input is refused with one clear line and exit
code 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec import counts, schedule
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.loading import from_tree, load
from sffn_dist.spec.plan import plan, render, si

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.json"))
SMALL: dict[str, Any] = {
    "model": {"layers": 3, "width": 32, "heads": 4, "sequence": 16, "vocab": 512},
    "ffn": {"kind": "low_rank", "width": 64, "rank": 8},
    "guide": {"mode": "fixed_step", "fraction": 0.25},
    "train": {"steps": 8, "global_batch_size": 8, "micro_batch_size": 2},
}


def small(precision: str = "auto", **over: dict[str, Any]) -> Config:
    parts = {name: {**SMALL.get(name, {}), **part} for name, part in over.items()}
    return from_tree({**SMALL, **parts, "precision": precision})


def pretrain(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as a user starts it, in a folder of its own."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    command = [sys.executable, str(ROOT / "sffn_dist" / "pretrain.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=folder, env={**inherited, **environment}
    )


# ---------------------------------------------------------------------------------------------------- numbers


def test_the_promised_keys_and_numbers() -> None:
    config = small()
    got = plan(config, world=2)
    # by hand: q k v o 4 x 32^2 + 4 x 32; layer 0 dense 2 x 32 x 64 + 96; layers 1, 2 rank 8: 2 x 8 x 96 + 96
    parts = {
        "embedding": 512 * 32,
        "attention": 3 * (4 * 32 * 32 + 4 * 32),
        "ffn_dense": 2 * 32 * 64 + 96,
        "ffn_structured": 2 * (2 * 8 * 96 + 96),
        "norms": (2 * 3 + 1) * 2 * 32,
    }
    assert got["parameters_by_part"] == parts
    assert got["parameters"] == sum(parts.values())
    assert type(got["parameters"]) is int
    assert got["guide_parameters"] == 2 * 2 * 32 * 64
    assert got["ffn"]["kind"] == got["ffn.kind"] == "low_rank"
    assert got["precision"] in ("bf16", "fp32")
    matrices = 512 * 32 + 3 * 4 * 32 * 32 + 2 * 32 * 64 + 2 * 2 * 8 * 96
    assert got["flops_per_step"] == (6 * matrices + 12 * 3 * 32 * 16) * 8 * 16
    assert got["guide_flops_per_guided_step"] == 6 * got["guide_parameters"] * 8 * 16
    assert got["flops_total"] == 8 * got["flops_per_step"] + 2 * got["guide_flops_per_guided_step"]
    assert (got["steps"], got["tokens_per_step"], got["tokens"]) == (8, 128, 1024)
    assert got["ranks"] == {"world": 2, "tensor": 1, "data": 2}
    assert got["accumulation_steps"] == 2
    plain, guided = got["flops_per_step"], got["flops_per_step"] + got["guide_flops_per_guided_step"]
    memory = [phase.pop("memory") for phase in got["phases"]]
    assert got["phases"] == [
        {"phase": "guided", "first_step": 0, "last_step": 1, "steps": 2, "tokens": 256, "flops": 2 * guided},
        {"phase": "plain", "first_step": 2, "last_step": 7, "steps": 6, "tokens": 768, "flops": 6 * plain},
    ]
    assert memory[0] == got["memory_per_rank"]["total"], "the guided phase takes the most"
    assert memory[1] == plan(small(guide={"mode": "off"}), 2)["memory_per_rank"]["total"], (
        "nothing is left of the guide"
    )
    assert got["structured_share_of_ffn"] == parts["ffn_structured"] / (
        parts["ffn_structured"] + parts["ffn_dense"]
    )
    assert got["ffn_parameters_of_dense"] == pytest.approx(
        (parts["ffn_structured"] + parts["ffn_dense"]) / (3 * parts["ffn_dense"])
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_plan_in_plain_json(path: Path) -> None:
    config = load(path)
    got = plan(config, config.parallel.tensor)
    assert json.loads(json.dumps(got, allow_nan=False)) == got
    assert got["parameters"] == sum(got["parameters_by_part"].values())
    assert got["phases"][0]["first_step"] == 0
    assert got["phases"][-1]["last_step"] == config.train.steps - 1 == got["steps"] - 1
    assert sum(phase["steps"] for phase in got["phases"]) == got["steps"]
    assert sum(phase["tokens"] for phase in got["phases"]) == got["tokens"]
    assert sum(phase["flops"] for phase in got["phases"]) == pytest.approx(got["flops_total"], rel=1e-12)
    assert all(isinstance(size, int) and size > 0 for size in got["memory_per_rank"].values())
    page = render(got)
    assert f"{got['ffn_parameters_of_dense']:.0%}" in page
    assert config.ffn.kind in page


def test_phases_follow_the_clock() -> None:
    for share in (0.0, 0.25, 0.5, 1.0):
        config = small(guide={"fraction": share})
        clock = schedule.build_schedule(config)
        phases = plan(config, 1)["phases"]
        named = [item["phase"] for item in phases for _ in range(item["first_step"], item["last_step"] + 1)]
        assert named == [clock.at(step).phase for step in range(8)]


def test_precision_asked_for_is_precision_planned() -> None:
    for precision in ("bf16", "fp32"):
        assert plan(from_tree({**SMALL, "precision": precision}), 1)["precision"] == precision


def test_stage_0_is_refused_in_bf16_whoever_chose_it(tmp_path: Path) -> None:
    """By the plan for a device of "auto" too, and by a start; before the data are looked at."""
    with pytest.raises(ConfigError, match=r"zero.stage = 0: must be 1, 2 or 3 in bf16 \(precision = bf16\)"):
        plan(small(precision="bf16", zero={"stage": 0}), 1)
    with pytest.raises(ConfigError, match=r"zero.stage = 0: .* \(precision = auto\)"):
        plan(small(zero={"stage": 0}), 1, device_memory=2**36)
    assert plan(small(precision="fp32", zero={"stage": 0}), 1)["zero"]["stage"] == 0
    over = ["train.micro_batch_size=1", "parallel.tensor=1", "zero.stage=0", "precision=bf16"]
    done = pretrain(["--config", str(ROOT / "configs/demo.json"), *over], tmp_path)
    assert done.returncode == 2
    assert "zero.stage = 0: must be 1, 2 or 3 in bf16" in done.stderr
    assert not list(tmp_path.iterdir())


def test_zero_traffic_is_planned_in_the_dtype_of_the_reduction() -> None:
    """Stage 1 sends gradients once a step, the others in every micro-step; weights come back in bf16."""
    elements = counts.parameters(small()) * 3 / 4
    for stage, dtype, gradients, weights in (
        (1, "fp32", 2 * 4, 2),
        (1, "bf16", 2 * 2, 2),
        (2, "fp32", 2 * 4 * 2, 2),
        (3, "bf16", 2 * 2, 2 * 2),
    ):
        zero = {"stage": stage, "reduce_dtype": dtype}
        batch = {"micro_batch_size": 1}  # of 8 on 4 ranks: two micro-steps
        planned = plan(small("bf16", zero=zero, guide={"mode": "off"}, train=batch), 4)
        assert planned["accumulation_steps"] == 2
        sent = planned["communication"]["data_parallel"]
        assert (sent["gradient"], sent["weights"]) == (gradients * elements, weights * elements)
        assert f"by data parallelism, ZeRO {stage}: gradients" in render(planned)
    fp32 = plan(small(precision="fp32", zero={"reduce_dtype": "bf16"}), 4)
    assert fp32["zero"]["reduce_dtype"] == "fp32", "of bf16 training alone"


@pytest.mark.parametrize(("stage", "tensor", "writers"), [(0, 1, 1), (1, 1, 4), (1, 2, 4), (0, 2, 2)])
def test_the_host_memory_of_a_save_is_planned(stage: int, tensor: int, writers: int) -> None:
    """12 bytes a parameter, over the ranks that write."""
    batch = {"micro_batch_size": 1}
    config = small("fp32", zero={"stage": stage}, parallel={"tensor": tensor}, train=batch)
    planned = plan(config, 4)
    share = si(planned["checkpoint_bytes"] / writers, "B")
    assert f"copied first, to about {share} of host memory a rank" in render(planned)
    cuda = render(plan(small("fp32", train=batch), 4, device_memory=2**36))
    assert "of pinned host memory a rank" in cuda
    assert "copied first" not in render(plan(small(checkpoint={"asynchronous": False}), 1))


def test_the_coin_halves_the_guides_flops_in_the_total() -> None:
    always, drawn = (
        plan(
            small(
                guide={"stochastic": coin},
                train={"steps": 800, "global_batch_size": 8, "micro_batch_size": 2},
            ),
            1,
        )
        for coin in (False, True)
    )
    guide = always["flops_total"] - always["flops_per_step"] * 800
    assert drawn["flops_total"] - drawn["flops_per_step"] * 800 == pytest.approx(guide / 2, rel=0.01)


def test_unused_settings_are_shown() -> None:
    config = small(ffn={"kind": "dense", "rank": 8})
    got = plan(config, 1)
    assert set(got["unused"]) == {"ffn.rank", "guide.mode", "guide.fraction"}
    page = render(got)
    assert "unused" in page
    assert all(key in page for key in got["unused"])
    assert "rank 8" not in page, "a rank that is not used is not shown as the run's"
    assert got["guide_parameters"] == 0
    assert counts.parameters(config) == got["parameters"]
    assert "unused" not in render(plan(small(), 1))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (211_000_000, "211 M"),
        (1e18, "1 E"),
        (999, "999"),
        (0, "0"),
        (1500, "1.5 k"),
        (2.5e12, "2.5 T"),
        (1e9, "1 G"),
    ],
)
def test_numbers_are_written_short(number: float, text: str) -> None:
    assert si(number) == text


# ------------------------------------------------------------------------------------------------- the script


def test_plan_json_is_one_object_quickly(tmp_path: Path) -> None:
    started = time.monotonic()
    done = pretrain(["--config", str(ROOT / "configs/wide_lowrank_m.json"), "--plan", "--json"], tmp_path)
    assert time.monotonic() - started < 5
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert {
        "parameters",
        "parameters_by_part",
        "ffn",
        "ffn.kind",
        "flops_per_step",
        "precision",
        "unused",
    } <= got.keys()
    assert got["run.dir"] == "runs/wide_lowrank_m"
    assert got["parameters"] == pytest.approx(219e6, abs=5e5)
    assert done.stderr == ""
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


def test_overrides_and_the_number_of_ranks_reach_the_plan(tmp_path: Path) -> None:
    demo = ["--config", str(ROOT / "configs/demo.json"), "--plan", "--json"]
    got = json.loads(
        pretrain([*demo, "train.steps=77", "run.dir=2024", "--local_rank=0"], tmp_path, WORLD_SIZE="4").stdout
    )
    assert (got["steps"], got["run.dir"], got["ranks"]) == (77, "2024", {"world": 4, "tensor": 2, "data": 2})
    assert json.loads(pretrain(demo, tmp_path).stdout)["ranks"]["world"] == 2, "a plan assumes one replica"


REFUSALS = {
    "unknown key": (["train.step=3"], ["train.step: unknown key", "train.steps"]),
    "wrong type": (["train.steps=many"], ['train.steps = "many": must be']),
    "width": (
        ["ffn.kind=low_rank", "ffn.width=511"],
        ["ffn.width = 511: must be divisible by parallel.tensor = 2"],
    ),
    "blocks": (["ffn.blocks=3"], ["ffn.blocks = 3: "]),
    "heads": (
        ["model.heads=1", "model.kv_heads=1"],
        ["model.heads = 1: must be divisible by parallel.tensor = 2"],
    ),
    "batch": (
        ["train.micro_batch_size=7"],
        ["train.micro_batch_size = 7: must divide train.global_batch_size = 16"],
    ),
    "contradiction": (
        ["ffn.kind=block_shuffle", "ffn.blocks=null"],
        ['ffn.blocks: missing; ffn.kind = "block_shuffle" needs it'],
    ),
    "init_from": (["init_from=no/such/run"], ["init_from = 'no/such/run': no such folder"]),
    "empty init_from": (["init_from=."], ["init_from = '.': holds no complete checkpoint"]),
    "source": (["data.source=no/such/text"], ['data.source = "no/such/text": ', "no such file or folder"]),
    "tokenizer": (["data.tokenizer=no/such.json"], ["data.tokenizer"]),
    "vocab": (["model.vocab=128"], ["model.vocab = 128: must be at least 257"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_with_a_clear_line(name: str, tmp_path: Path) -> None:
    overrides, says = REFUSALS[name]
    done = pretrain(["--config", str(ROOT / "configs/demo.json"), "--plan", *overrides], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("pretrain.py: error: ")
    assert all(line.startswith("pretrain.py: error: ") for line in lines), "no traceback"
    assert any(all(text in line for text in says) for line in lines), lines
    if name not in ("heads", "blocks"):  # these break two rules
        assert len(lines) == 1
    assert not list(tmp_path.iterdir())


def test_missing_files_and_arguments_are_refused(tmp_path: Path) -> None:
    done = pretrain(["--config", "none.json", "--plan"], tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "pretrain.py: error: config file 'none.json': no such file\n",
    )
    done = pretrain(["--plan"], tmp_path)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_a_run_on_the_wrong_number_of_ranks_is_refused_by_one_rank_before_anything_is_written(
    tmp_path: Path,
) -> None:
    arguments = ["--config", str(ROOT / "configs/demo.json")]
    done = pretrain(arguments, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "pretrain.py: error: parallel.tensor = 2: must divide the number of ranks, 1 "
    )
    quiet = pretrain(arguments, tmp_path, RANK="1", WORLD_SIZE="3")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (2, "", "")
    assert not list(tmp_path.iterdir())
