"""train.micro_batch_size=auto: the largest divisor that fits a device, 8 at most on a CPU; what the plan says
of it and of what a device holds besides the tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.launch import cli, run_identity
from sffn_dist.spec import machine, memory, micro_batch
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.memory import memory_per_rank
from sffn_dist.spec.micro_batch import Target, choose, largest_that_fits, with_size
from sffn_dist.spec.plan import plan, render
from sffn_dist.spec.validation import check_world

GIB = 2**30
TREE: dict[str, Any] = {
    "run": {"dir": "none"},
    "model": {"layers": 12, "width": 1024, "heads": 16},
    "ffn": {"kind": "low_rank", "rank": 256},
    "guide": {"mode": "fixed_step", "fraction": 0.5},
    "train": {"steps": 100, "global_batch_size": 96, "micro_batch_size": "auto"},
}


def tree(**over: Any) -> Config:
    return from_tree({**TREE, **{key: {**TREE.get(key, {}), **value} for key, value in over.items()}})


def on_device(size: int, data_parallel: int = 2) -> Target:
    return Target(data_parallel, "bf16", size)


@pytest.mark.parametrize("gib", [8, 16, 40, 80, 141])
@pytest.mark.parametrize("data_parallel", [1, 2, 3])
def test_the_largest_divisor_that_fits(gib: int, data_parallel: int) -> None:
    config, target = tree(), on_device(gib * GIB, data_parallel)
    size = choose(config, target).size
    share = 96 // data_parallel
    need = {
        n: memory_per_rank(with_size(config, n), "bf16", data_parallel, guide=True, device=True)["total"]
        for n in range(1, share + 1)
        if share % n == 0
    }
    assert (
        size == max(n for n, total in need.items() if total <= gib * GIB) == largest_that_fits(config, target)
    )
    check_world(with_size(config, size), data_parallel)


def test_while_the_guide_lasts_it_must_fit_too() -> None:
    plain = tree(guide={"mode": "off"})
    size = with_size(plain, 24), with_size(tree(), 24)
    room = micro_batch.memory(size[0], on_device(80 * GIB))["total"]
    assert choose(plain, on_device(room)).size == 24
    assert choose(tree(), on_device(room)).size < 24


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError) as refused:
        choose(tree(), on_device(1 * GIB))
    (problem,) = refused.value.problems
    assert problem.startswith("train.micro_batch_size = auto: one sequence needs about ")
    assert "the device has 1.07 GB; raise parallel.tensor or zero.stage, or set recompute" in problem


@pytest.mark.parametrize(
    ("batch", "ranks", "size"), [(512, 8, 8), (96, 4, 8), (12, 1, 6), (7, 1, 7), (33, 1, 3)]
)
def test_on_a_cpu_eight_or_the_largest_divisor_below(batch: int, ranks: int, size: int) -> None:
    choice = choose(tree(train={"global_batch_size": batch}), Target(ranks, "fp32", None))
    assert choice.size == size
    assert choice.reason.startswith("on a CPU the largest divisor, at most 8, of the ")


def test_what_is_refused() -> None:
    for wrong in (0, -1, "many", 2.5, True, None):
        with pytest.raises(ConfigError) as refused:
            tree(train={"micro_batch_size": wrong})
        text = f"train.micro_batch_size = {json.dumps(wrong)}: must be a positive integer, or auto"
        assert len(refused.value.problems) == 1
        assert refused.value.problems[0].startswith(text)
    with pytest.raises(
        ConfigError, match=r"^train.global_batch_size = 96: must be a multiple of the data-par"
    ):
        check_world(tree(), 5)


def test_a_restart_takes_what_is_recorded(tmp_path: Path) -> None:
    config = tree(run={"dir": str(tmp_path)})
    chosen, reason = run_identity.choose_micro_batch(config, on_device(80 * GIB))
    assert reason.startswith("the largest divisor of the 48 sequences that a rank has in a step which fits: ")
    run_identity.write_record(with_size(config, 2), "0" * 64)
    assert json.loads((tmp_path / "run.json").read_text())["config"]["train"]["micro_batch_size"] == 2
    taken, why = run_identity.choose_micro_batch(config, on_device(80 * GIB))
    assert (taken.micro_batch_size, why) == (2, "recorded by run.json")
    assert chosen.micro_batch_size > 2
    anew, _ = run_identity.choose_micro_batch(config, on_device(80 * GIB, data_parallel=32))
    assert anew.micro_batch_size == 3, "2 does not divide a rank's 3 sequences"
    given, why = run_identity.choose_micro_batch(with_size(config, 4), on_device(80 * GIB))
    assert (given.micro_batch_size, why) == (4, "")
    run_identity.check_identity(with_size(config, 4))


# --------------------------------------------------------------------------------------------------- the plan


def test_a_plan_for_a_device_names_its_assumptions() -> None:
    got = plan(tree(), 2, device_memory=80 * GIB)
    held = got["memory_per_rank"]
    assert (held["cuda_context"], held["nccl_buffers"]) == (memory.CUDA_CONTEXT, memory.NCCL_BUFFERS)
    tensors = sum(size for part, size in held.items() if part not in (*memory.BESIDES, "total"))
    assert held["allocator_slack"] == int(memory.ALLOCATOR_SLACK * tensors)
    assert held["total"] == sum(size for part, size in held.items() if part != "total") <= 80 * GIB
    assert plan(tree(), 1, device_memory=80 * GIB)["memory_per_rank"]["nccl_buffers"] == 0
    page = render(got)
    assert "besides the tensors, assumed and not measured: CUDA context 629 MB, NCCL buffers 537 MB" in page
    assert "allocator slack 5%" in page
    assert got["precision"] == "bf16"
    assert got["micro_batch"]["size"] == got["micro_batch"]["largest_that_fits"]
    assert f"{got['micro_batch']['size']} sequences: the largest divisor of the 48 sequences" in page


@pytest.mark.skipif(machine.cuda_capability() is not None, reason="there is a CUDA device")
def test_a_plan_for_a_cpu_holds_tensors_alone() -> None:
    got = plan(tree(), 2)
    assert not got["memory_per_rank"].keys() & set(memory.BESIDES)
    assert got["micro_batch"] == {
        "size": 8,
        "reason": "on a CPU the largest divisor, at most 8, of the 48 sequences that a rank has in a step",
        "device_memory": None,
        "largest_that_fits": None,
    }
    assert "assumed" not in render(got)
    assert got["accumulation_steps"] == 6


def test_a_plan_proposes_the_largest_that_fits() -> None:
    config = with_size(tree(), 1)
    fitting = choose(tree(), on_device(40 * GIB)).size
    line = f"1 sequence; the largest that fits the device's 42.9 GB is {fitting}"
    assert line in render(plan(config, 2, device_memory=40 * GIB))
    assert "1 sequence; not even one fits the device's 1.07 GB" in render(plan(config, 2, device_memory=GIB))


def test_the_device_of_a_plan_is_given_in_gib(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**TREE, "run": {"dir": str(tmp_path / "run")}}))
    words = ["--config", str(tmp_path / "a.json"), "--device-memory", "40"]
    assert cli.main([*words, "--plan", "--json"], pretrain=lambda *_: 1) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["micro_batch"]["device_memory"] == 40 * GIB
    for wrong in (words, [*words[:-1], "0", "--plan"], [*words[:-1], "nan", "--plan"]):
        assert cli.main(wrong, pretrain=lambda *_: 1) == 2
        assert "--device-memory" in capsys.readouterr().err
