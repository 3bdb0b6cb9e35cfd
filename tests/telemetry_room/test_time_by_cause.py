"""Time by cause, from events made by hand: as a CPU's profiler gives them, and as CUDA's does."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sffn_dist.telemetry import time_table
from sffn_dist.telemetry.chrome_trace import write_trace
from sffn_dist.telemetry.intervals import difference, intersection, union
from sffn_dist.telemetry.profiler_events import read_events
from sffn_dist.telemetry.time_by_cause import NODE, WAITING, Cause, Event, Kind, Share, attribute

REGIONS = {
    "layers.0.mlp": Cause.STRUCTURED_FFN,
    "layers.0.self_attention": Cause.ATTENTION,
    "loss": Cause.LOSS,
    "data": Cause.DATA,
    "optimizer": Cause.OPTIMIZER,
}
MAIN, BACKWARD, GLOO = 1, 2, 7


def span(name: str, start: int, end: int, thread: int = MAIN) -> Event:
    return Event(name, Kind.RANGE, start, end, thread)


def op(name: str, start: int, end: int, thread: int = MAIN, **facts: int) -> Event:
    return Event(name, Kind.OPERATOR, start, end, thread, **facts)


def node(name: str, start: int, end: int, sequence: int, thread: int = MAIN) -> Event:
    return op(f"{NODE}: {name}", start, end, thread, sequence=sequence, forward_thread=MAIN)


def kernel(name: str, start: int, end: int, operator: int = 0, launch: int = 0, stream: int = 7) -> Event:
    return Event(name, Kind.KERNEL, start, end, stream, operator=operator, launch=launch)


def shares(events: list[Event]) -> dict[tuple[Cause, bool], int]:
    times = attribute(events, REGIONS)
    assert sum(times.shares.values()) == sum(times.step_times)
    return {tuple(share): time for share, time in times.shares.items()}


# -------------------------------------------------------------------------------------------------------- cpu

CPU_STEP = [
    span("ProfilerStep#3", 0, 1000),
    span("data", 10, 60),
    op("aten::to", 50, 55),
    span("layers.0", 70, 300),
    op("aten::layer_norm", 75, 85, sequence=0),
    span("layers.0.self_attention", 90, 150),
    op("aten::linear", 95, 145, sequence=1),
    op("aten::t", 96, 99, sequence=1),
    op("aten::addmm", 100, 140, sequence=2),
    span("layers.0.mlp", 150, 300),
    op("ColumnFunction", 160, 280, sequence=4),  # 3 was made by aten::addmm, beside its own
    op("c10d::allreduce_", 170, 175),
    span(WAITING, 180, 220),
    op("aten::mm", 220, 270),
    span("loss", 310, 340),
    op("aten::sum", 315, 335, sequence=5),
    # the backward pass: last in, first out
    node("SumBackward0", 400, 410, 5),
    node("ColumnFunctionBackward", 410, 500, 4),
    span(WAITING, 450, 470),
    node("CopySlices", 500, 520, 3),
    node("AddmmBackward0", 520, 560, 2),
    op(f"{NODE}: torch::autograd::AccumulateGrad", 560, 570),
    node("NativeLayerNormBackward0", 580, 600, 0),
    span("optimizer", 700, 900),
    op("aten::_foreach_add_", 710, 890),
    Event("gloo:all_reduce", Kind.COLLECTIVE, 185, 230, GLOO),
    Event("gloo:all_reduce", Kind.COLLECTIVE, 430, 470, GLOO),
    Event("gloo:barrier", Kind.COLLECTIVE, 1100, 1200, GLOO),  # after the step
    op("aten::add_", 190, 200, GLOO),
]


def test_a_cpus_time_is_that_of_the_operators_of_the_steps_thread() -> None:
    assert shares(CPU_STEP) == {
        (Cause.DATA, False): 50,
        (Cause.REST, False): 10,
        (Cause.ATTENTION, False): 50,
        (Cause.STRUCTURED_FFN, False): 120 - 5 - 40,
        (Cause.EXPOSED, False): 5 + 40 + 20,
        (Cause.LOSS, False): 20,
        (Cause.LOSS, True): 10,
        (Cause.STRUCTURED_FFN, True): 70,
        (Cause.ATTENTION, True): 60,
        (Cause.GRADIENTS, False): 10,
        (Cause.REST, True): 20,
        (Cause.OPTIMIZER, False): 180,
        (Cause.IDLE, False): 1000 - 50 - 10 - 50 - 75 - 65 - 20 - 10 - 70 - 60 - 10 - 20 - 180,
    }


def test_on_a_cpu_communication_is_hidden_where_the_thread_does_not_wait() -> None:
    assert attribute(CPU_STEP, REGIONS).hidden == (230 - 220) + (450 - 430)


def test_a_forward_that_is_recomputed_in_the_backward_pass_is_backward() -> None:
    events = [
        span("ProfilerStep#0", 0, 100),
        span("layers.0.mlp", 0, 10),
        op("aten::mm", 0, 10, sequence=8),
        node("MmBackward0", 20, 60, 8),
        span("layers.0.self_attention", 30, 50),
        op("aten::mm", 30, 50, sequence=9),
        node("LateBackward0", 70, 80, 9),
    ]
    assert shares(events) == {
        (Cause.STRUCTURED_FFN, False): 10,
        (Cause.STRUCTURED_FFN, True): 20
        + 10,  # sequence 9 was made inside of the backward pass: 8 is nearest
        (Cause.ATTENTION, True): 20,
        (Cause.IDLE, False): 40,
    }


def test_only_steps_count() -> None:
    events = [
        span("ProfilerStep#4", 100, 200),
        op("aten::mm", 0, 150),
        op("aten::mm", 190, 400),
        span("ProfilerStep#5", 300, 350),
    ]
    times = attribute(events, REGIONS)
    assert (times.steps, times.step_times) == ((4, 5), (100, 50))
    assert dict(times.shares) == {Share(Cause.REST): 50 + 10 + 50, Share(Cause.IDLE): 40}
    with pytest.raises(ValueError, match="ProfilerStep#N"):
        attribute([op("aten::mm", 0, 1)], REGIONS)


# ------------------------------------------------------------------------------------------------------- cuda

CUDA_STEP = [
    span("ProfilerStep#3", 0, 1000),
    span("data", 0, 150),
    span("layers.0.mlp", 150, 250),
    op("aten::mm", 160, 170, number=11, sequence=1),
    op("c10d::_allgather_base_", 180, 190, number=12),
    op("aten::mm", 200, 210, number=13, sequence=2),
    Event("cuLaunchKernel", Kind.LAUNCH, 230, 231, MAIN, number=900),
    node("MmBackward0", 300, 400, 1, BACKWARD),
    op("aten::mm", 310, 320, BACKWARD, number=14),
    span("optimizer", 500, 600),
    op("aten::_fused_adamw_", 510, 520, number=15),
    op("aten::copy_", 530, 540, number=16),
    kernel("gemm", 200, 300, operator=11),
    kernel("ncclDevKernel_AllGather", 280, 360, operator=12, stream=9),
    kernel("gemm", 360, 420, operator=13),
    kernel("triton_bottleneck", 430, 440, launch=900),
    kernel("gemm", 500, 600, operator=14),
    kernel("ncclDevKernel_ReduceScatter", 520, 560, operator=12, stream=9),
    kernel("adamw", 700, 800, operator=15),
    kernel("Memcpy DtoD", 750, 820, operator=16, stream=8),
    kernel("who knows", 900, 910),
]


def test_cudas_time_is_that_of_the_kernels_by_who_launched_them() -> None:
    found = shares(CUDA_STEP)
    assert found == {
        (Cause.DATA, False): 150,
        (Cause.STRUCTURED_FFN, False): 100 + 60 + 10,
        (Cause.STRUCTURED_FFN, True): 100,
        (Cause.EXPOSED, False): 60,
        (Cause.OPTIMIZER, False): 120,
        (Cause.REST, False): 10,
        (Cause.IDLE, False): 50 + 10 + 60 + 100 + 80 + 90,
    }
    assert attribute(CUDA_STEP, REGIONS).hidden == 20 + 40


def test_data_is_awaited_only_while_no_kernel_runs() -> None:
    events = [*CUDA_STEP, kernel("gemm", 50, 90, operator=11)]
    assert shares(events)[Cause.DATA, False] == 150 - 40


def test_of_kernels_that_run_together_the_newest_is_charged() -> None:
    events = [
        span("ProfilerStep#0", 0, 100),
        span("layers.0.mlp", 0, 5),
        op("aten::mm", 0, 5, number=1),
        span("optimizer", 5, 9),
        op("aten::add_", 5, 9, number=2),
        kernel("long", 10, 90, operator=1),
        kernel("short", 20, 30, operator=2, stream=8),
        kernel("shorter", 25, 40, operator=2, stream=9),
    ]
    assert shares(events) == {
        (Cause.STRUCTURED_FFN, False): 60,
        (Cause.OPTIMIZER, False): 20,
        (Cause.IDLE, False): 20,
    }


def recorded(
    activity: str, name: str, start: int, length: int, thread: int = 1, resource: int = 600, **facts: Any
) -> Any:
    """As torch's profiler gives an event."""
    values = {
        "activity_type": activity,
        "name": name,
        "start_ns": start,
        "duration_ns": length,
        "start_thread_id": thread,
        "device_resource_id": resource,
        "is_async": False,
        "correlation_id": 0,
        "linked_correlation_id": 0,
        "sequence_nr": -1,
        "fwd_thread_id": 0,
        **facts,
    }
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_what_the_profiler_records_on_cuda_is_read() -> None:
    events = read_events(
        [
            recorded("user_annotation", "ProfilerStep#0", 0, 100),
            recorded("user_annotation", "layers.0.mlp", 0, 40),
            recorded("cpu_op", "aten::mm", 1, 9, correlation_id=5),
            # the launch's thread is the system's
            recorded("cuda_runtime", "cudaLaunchKernel", 3, 1, thread=0, correlation_id=70),
            recorded("cuda_driver", "cuLaunchKernel", 20, 1, thread=0, correlation_id=71),
            recorded("kernel", "gemm", 10, 20, 0, 7, correlation_id=74, linked_correlation_id=5),
            recorded("kernel", "triton_", 30, 5, 0, 7, correlation_id=71),
            recorded("gpu_user_annotation", "layers.0.mlp", 10, 25, 0, 7),
            recorded("gpu_memcpy", "Memcpy HtoD", 50, 5, 0, 8, correlation_id=72),
            recorded("overhead", "Buffer Flush", 60, 10),
            recorded("cuda_runtime", "cudaLaunchKernel", 3, 1, resource=601, correlation_id=73),
        ]
    )
    assert [event.kind.name for event in events if event.start >= 10] == ["KERNEL"] * 3 + ["LAUNCH"]
    assert shares(events) == {
        (Cause.STRUCTURED_FFN, False): 25,
        (Cause.REST, False): 5,
        (Cause.IDLE, False): 70,
    }


# ---------------------------------------------------------------------------------------- intervals, output


def test_intervals() -> None:
    assert union([(5, 7), (1, 3), (2, 4), (4, 5), (9, 9)]) == [(1, 7)]
    assert intersection([(0, 10), (20, 30)], [(5, 8), (9, 25)]) == [(5, 8), (9, 10), (20, 25)]
    assert difference([(0, 10), (20, 30)], [(5, 8), (9, 25)]) == [(0, 5), (8, 9), (25, 30)]
    assert difference([(0, 10)], []) == [(0, 10)]


def test_the_table_sums_to_the_step() -> None:
    table = time_table.as_json(attribute(CPU_STEP, REGIONS), 2, "cpu")
    assert table["step_ms"] == pytest.approx(0.001)
    twice = time_table.as_json(attribute([*CPU_STEP, span("ProfilerStep#4", 2000, 5000)], REGIONS), 2, "cpu")
    assert (twice["step_ms"], twice["steps_ms"]) == (pytest.approx(0.002), [0.001, 0.003]), "a mean"
    assert sum(row["ms"] for row in table["rows"]) == pytest.approx(table["step_ms"], rel=1e-12)
    lines = time_table.render(table).splitlines()
    assert lines[0] == "time by cause, rank 2 on cpu, step 3, ms a step"
    assert [line.split("  ")[0] for line in lines[2:-2]] == [cause.value for cause in Cause]
    assert lines[-2].split() == ["step", "0.00", "100.0%"]
    assert lines[-1].startswith("communication, hidden")


def test_the_trace_holds_every_event_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rank_00002.trace.json.gz"
    write_trace(path, CUDA_STEP, 2)
    tree = json.loads(gzip.decompress(path.read_bytes()))
    rows = tree["traceEvents"]
    drawn = [row for row in rows if row["ph"] == "X"]
    lines = {row["args"]["name"] for row in rows if row["name"] == "thread_name"}
    assert lines == {"thread 1", "thread 2", "stream 7", "stream 8", "stream 9"}
    assert [(row["name"], row["cat"]) for row in drawn] == [(e.name, e.kind.value) for e in CUDA_STEP]
    assert {row["pid"] for row in rows} == {2}
    assert len({row["tid"] for row in drawn if row["cat"] == "kernel"}) == 3, "a line a stream"
    arrows = [(row["name"], row["ph"]) for row in rows if row["ph"] in "sf"]
    assert sorted(arrows) == [
        *(("forward to backward", phase) for phase in "fs"),
        *(("launch", phase) for phase in "fs"),
    ]
