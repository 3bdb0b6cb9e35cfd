"""tools/bench.py roofline: predicted times against sums by hand, the plan's FLOPs and counted launches."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sffn_bench import device_work, roofline
from sffn_bench.device_work import DeviceRates, Work
from sffn_bench.model_work import ModelWork

from sffn_dist.spec import counts, loading
from sffn_dist.spec.config import Config, ConfigError

H100 = roofline.rates_of("H100")
KINDS = ("low_rank", "block_dense", "block_shuffle")


def paper(root: Path, name: str, *overrides: str) -> Config:
    return loading.load(str(root / "configs" / "paper" / f"xl_{name}.json"), overrides)


def micro_step(config: Config) -> list[Work]:
    return list(ModelWork(config, H100).micro_step())


def named(config: Config) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in roofline.predict(config, H100).rows}


def bench(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "tools" / "bench.py"), "roofline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ---------------------------------------------------------------------------------------------------- by hand


def test_a_product_by_hand() -> None:
    """8,192 tokens, 2048 -> 6144, bf16: 2 (8192 x 2048 + 2048 x 6144 + 8192 x 6144) bytes, 2 x 8192 x 2048 x
    6144 FLOPs; bounded by FLOPs on an H100, by memory where that is a hundredth as fast.
    """
    work = device_work.product("x", 8192, 2048, 6144)
    assert (work.bytes, work.flops) == (159_383_552, 206_158_430_208)
    assert work.seconds(H100) == pytest.approx(206_158_430_208 / (0.70 * 989e12))
    slow = DeviceRates("slow", 989e12, 33.5e9, 1.0)
    assert work.seconds(slow) == pytest.approx(159_383_552 / (0.85 * 33.5e9))


def test_attention_linears_by_hand(root: Path) -> None:
    """Of 24 layers: qkv 2048 -> 6144 with a bias added in a pass, proj 2048 -> 2048; twice of each in
    backward, where the bias's gradient reads 8192 x 6144.
    """
    rows, t = named(paper(root, "dense")), 8192
    products = 2 * (2 * t * 2048 + 2048 * 2048) + 2 * (t * 8192 + 2048 * 6144)
    assert rows["forward attention linears"]["bytes"] == 24 * (products + 4 * t * 6144)
    assert rows["backward attention linears"]["bytes"] == 24 * (2 * products + 2 * t * 6144)
    assert rows["forward attention linears"]["flops"] == 24 * 2 * t * 2048 * 8192
    assert rows["forward attention linears"]["launches"] == 24 * 3


def test_what_triton_does_not_move(root: Path) -> None:
    """Plain torch writes y and reads it for the activation (T f each), in backward writes dL/da and reads it,
    and reads dL/dy for the bias: the bytes of 23 structured layers by hand, rank 512, f 8192.
    """

    def moved(kernels: str, direction: str) -> int:
        works = micro_step(paper(root, "low_rank_32", f"kernels={kernels}"))
        return sum(work.bytes for work in works if work.part.startswith(f"{direction} structured"))

    wide = 2 * 8192 * 8192
    assert moved("torch", "forward") - moved("triton", "forward") == 23 * wide
    assert moved("torch", "backward") - moved("triton", "backward") == 23 * 3 * wide
    down, up = 8192 * (2048 + 512) + 2048 * 512, 8192 * (512 + 8192) + 512 * 8192
    assert moved("triton", "forward") == 23 * (2 * 2 * (down + up) + wide)


# ----------------------------------------------------------------------------------------------- FLOPs, ranks


@pytest.mark.parametrize("name", ["dense", *(f"{kind}_32" for kind in KINDS)])
@pytest.mark.parametrize("recompute", ["none", "bottleneck", "full"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_flops_are_those_of_the_plan(root: Path, name: str, recompute: str, ranks: int) -> None:
    """Equal but for what counts.flops_per_token says of itself: causal attention is not halved there (half of
    12 L A S a token), and what is recomputed does not count.
    """
    if name == "dense" and recompute == "bottleneck":
        return
    layout = (f"parallel.tensor={ranks}", "parallel.sequence=true", f"recompute={recompute}")
    config = paper(root, name, *layout)
    found = sum(work.flops - work.recomputed for work in micro_step(config))
    halved = 6 * 24 * 2048 * 1024
    assert found * ranks == (counts.flops_per_token(config) - halved) * 8192


def test_flops_of_gated_untied_and_grouped(root: Path) -> None:
    """SwiGLU, an output layer of its own, fewer key/value heads than query heads."""
    changed = ("model.activation=swiglu", "model.tie_embeddings=false", "model.kv_heads=4")
    config = paper(root, "low_rank_32", *changed)
    found = sum(work.flops - work.recomputed for work in micro_step(config))
    assert found == (counts.flops_per_token(config) - 6 * 24 * 2048 * 1024) * 8192


@pytest.mark.parametrize("name", ["dense", *(f"{kind}_32" for kind in KINDS)])
def test_two_ranks_halve_the_feed_forward_flops(root: Path, name: str) -> None:
    def flops(*overrides: str) -> int:
        return sum(work.flops for work in micro_step(paper(root, name, *overrides)) if "FFN" in work.part)

    alone = flops()
    assert 2 * flops("parallel.tensor=2", "parallel.sequence=true") == alone
    if name == "low_rank_32":  # without sequence parallelism every rank computes both narrow factors whole
        narrow = 23 * 3 * 2 * 2 * 8192 * 2048 * 512
        assert 2 * flops("parallel.tensor=2") == alone + narrow


def test_ranks_receive_what_the_plan_says(root: Path) -> None:
    """LowRank of rank 512 on two ranks with sequence parallelism: benchmarks/results/fake_cuda.md has 2567.01
    MB a micro-step.
    """
    works = micro_step(paper(root, "low_rank_32", "parallel.tensor=2", "parallel.sequence=true"))
    received = [work for work in works if work.unit == "link"]
    assert sum(work.bytes for work in received) / 1e6 == pytest.approx(2567.01, abs=0.01)
    assert len(received) == 225
    link = sum(work.seconds(H100) for work in received)
    assert link == pytest.approx(sum(work.bytes for work in received) / (0.8 * 450e9))


@pytest.mark.parametrize("layout", ["tp1", "tp2", "tp2+sp"])
def test_launches_are_those_that_were_counted(root: Path, layout: str) -> None:
    """Kernels and collectives of tests/gpu_room/fake_cuda, which runs plain torch."""
    folder = root / "tests" / "gpu_room" / "fake_cuda"
    spec = importlib.util.spec_from_file_location("fake_cuda_sweep", folder / "sweep.py")
    assert spec
    assert spec.loader
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    case = sweep.Case(1, layout, False)
    tree = sweep.request(case, sweep.SMALL)["tree"] | {"kernels": "torch"}
    counted = json.loads((folder / "expected.json").read_text())[str(case)]
    rows = named(loading.from_tree(tree))
    sent = sum(calls for calls, _ in counted["collectives"]["micro"].values())
    assert rows["micro-step"]["launches"] == counted["kernels"]["micro"] + sent
    gradients = int(layout == "tp2+sp")
    assert rows["update"]["launches"] == counted["kernels"]["update"] + gradients


# ------------------------------------------------------------------------------------------------------ times


def test_structured_is_faster_than_dense(root: Path) -> None:
    """And by the more, the fewer its parameters."""
    dense = roofline.predict(paper(root, "dense"), H100)
    for kind in KINDS:
        at_63, at_32 = (roofline.predict(paper(root, f"{kind}_{share}"), H100) for share in (63, 32))
        assert at_32.micro_step < at_63.micro_step < dense.micro_step
        assert at_32.step < at_63.step < dense.step


def test_rows_add_up(root: Path) -> None:
    """64 micro-steps of 8 sequences and an update; MFU by the plan's FLOPs."""
    config = paper(root, "low_rank_32")
    found = roofline.predict(config, H100)
    parts = [row["part"] for row in found.rows]
    assert len(set(parts)) == len(parts)
    end = parts.index("micro-step")
    for column in ("launches", "bytes", "flops", "ms"):
        own, update, step = found.rows[end], found.rows[-2], found.rows[-1]
        assert own[column] == pytest.approx(sum(row[column] for row in found.rows[:end]), rel=1e-5)
        assert update[column] == pytest.approx(sum(row[column] for row in found.rows[end + 1 : -2]), rel=1e-5)
        assert step[column] == pytest.approx(64 * own[column] + update[column], rel=1e-5)
    assert found.micro_step == pytest.approx(found.rows[end]["ms"] / 1e3)
    needed = counts.flops_per_token(config) * 8192
    assert found.rows[end]["mfu"] == pytest.approx(needed / found.micro_step / 989e12, abs=1e-4)
    assert found.rows[-1]["mfu"] == pytest.approx(64 * needed / found.step / 989e12, abs=1e-4)


def test_the_host_bounds_a_small_model(root: Path) -> None:
    """5 us a launch, where the device would be done sooner."""
    small = ("model.width=64", "model.heads=4", "ffn.width=256", "ffn.rank=16", "model.vocab=512")
    rows = named(paper(root, "low_rank_32", *small, "train.micro_batch_size=1", "model.sequence=32"))
    assert rows["micro-step, waits for the host"]["ms"] > 0
    assert rows["micro-step"]["ms"] == pytest.approx(5e-3 * rows["micro-step"]["launches"], rel=1e-4)
    large = named(paper(root, "low_rank_32"))
    assert large["micro-step, waits for the host"]["ms"] == 0


def test_recomputing_takes_time(root: Path) -> None:
    none, bottleneck, full = (
        roofline.predict(paper(root, "low_rank_32", f"recompute={mode}"), H100).micro_step
        for mode in ("none", "bottleneck", "full")
    )
    assert none < bottleneck < full


# ----------------------------------------------------------------------------------------------- command line


def test_table_csv_and_overrides(root: Path, tmp_path: Path) -> None:
    """Nothing heavy is imported, nothing measured, and that is said."""
    arguments = ("--config", str(root / "configs/paper/xl_low_rank_32.json"), "--device", "nvidia h200")
    done = bench(root, *arguments, "train.micro_batch_size=4", "--csv", str(tmp_path / "rows.csv"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nothing here was measured"
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["part", "launches", "bytes", "flops", "ms", "mfu", "assumption"]
    by_part = {row["part"]: row for row in rows}
    assert by_part["micro-step"]["assumption"] == "4096 tokens; nothing here was measured"
    assert by_part["step"]["assumption"].startswith("128 micro-steps")
    assert all(row["assumption"] for row in rows)
    config = paper(root, "low_rank_32", "train.micro_batch_size=4")
    expected = roofline.predict(config, roofline.rates_of("H200"))
    assert float(by_part["step"]["ms"]) == pytest.approx(1e3 * expected.step)
    printed = json.loads(bench(root, *arguments, "train.micro_batch_size=4", "--json").stdout)
    assert [row["ms"] for row in printed] == [row["ms"] for row in expected.rows]


def test_it_imports_no_torch(root: Path) -> None:
    script = "import sys; from sffn_bench import roofline; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "T4"), "--device T4: must be one of GH200, H200, H800 PCIe"),
        (("--device", "T4", "--peak-tflops", "65"), "or give --bandwidth"),
        (
            ("--device", "T4", "--peak-tflops", "65", "--bandwidth", "1", "parallel.tensor=2"),
            "or give --link",
        ),
        (("--bandwidth", "0"), "argument --bandwidth: 0 is not a finite number above 0"),
        (("precision=fp32",), 'precision = "fp32": must be "auto" or "bf16"'),
        (("train.micro_batch_size=auto",), 'train.micro_batch_size = "auto": must be a number here'),
        (("zero.stage=0",), "zero.stage = 0: must be 1, 2 or 3 in bf16"),
        (("model.layer=3",), "model.layer: unknown key; the nearest known one is model.layers"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_refused(root: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """With the key, the value and the rule; nothing is written."""
    table = tmp_path / "rows.csv"
    config = str(root / "configs" / "paper" / "xl_low_rank_32.json")
    done = bench(root, "--config", config, "--csv", str(table), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert not table.exists()


def test_rates_may_be_given(root: Path) -> None:
    """An unknown device needs no link where nothing is sent; a given rate counts before the data sheet's."""
    given = roofline.rates_of("T4", flops=65e12, memory=0.3e12, linked=False)
    slow = roofline.predict(paper(root, "low_rank_32"), given)
    assert slow.micro_step > 10 * roofline.predict(paper(root, "low_rank_32"), H100).micro_step
    assert roofline.rates_of("H100", memory=2e12).memory == 2e12
    assert roofline.rates_of("H100", memory=2e12).flops == 989e12
    with pytest.raises(ConfigError, match="--device T4"):
        roofline.rates_of("T4")


def test_a_run_that_cannot_be_predicted_has_no_prediction(root: Path) -> None:
    config = paper(root, "low_rank_32")
    assert roofline.predicted(config, "NVIDIA H100 80GB HBM3", "fp32") is None
    assert roofline.predicted(config, "4 cores", "bf16") is None
    found = roofline.predicted(config, "NVIDIA H100 80GB HBM3", "bf16")
    assert found
    assert found == roofline.predict(config, roofline.rates_of("NVIDIA H100 80GB HBM3"))
