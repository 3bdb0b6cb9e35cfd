"""Slurm's variables and notations, read without a Slurm."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.launch import environment, ports
from sffn_dist.spec.config import ConfigError

STEP = {  # of the third of five tasks on nodes of two
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "localhost,n[02-03]",
}
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")

# ------------------------------------------------------------------------------------------------------ adopt


def test_a_task_of_srun_is_described_as_torchrun_would() -> None:
    environ = dict(STEP)
    assert environment.set_rank_variables(environ)
    assert [environ[name] for name in TORCH] == ["2", "5", "0", "2", "localhost"]
    assert environ["MASTER_PORT"] == str(ports.rendezvous_port(41, 2))
    assert not environment.set_rank_variables(environ), "once is enough"
    last = STEP | {"SLURM_PROCID": "4", "SLURM_NODEID": "2"}
    environment.set_rank_variables(last)
    assert last["LOCAL_WORLD_SIZE"] == "1"


def test_what_is_set_stays() -> None:
    environ = STEP | {
        "MASTER_ADDR": "10.0.0.9",
        "MASTER_PORT": "1234",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_SOCKET_IFNAME": "ib",
    }
    assert environment.set_rank_variables(environ)
    assert [
        environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    ] == [*("10.0.0.9", "1234", "ib0", "ib")]
    by_torchrun = STEP | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    before = dict(by_torchrun)
    assert not environment.set_rank_variables(by_torchrun)
    assert by_torchrun == before


@pytest.mark.parametrize(
    "other",
    [
        {"SLURM_STEP_ID": "4294967291"},  # the batch script
        {"SLURM_STEP_ID": "4294967290"},  # the shell of an allocation
        {"SLURM_STEP_ID": None},
        {"SLURM_STEP_NUM_TASKS": "1"},  # a process by itself: several of them may run beside one another
    ],
)
def test_outside_of_a_step_nothing_is_translated(other: dict[str, str | None]) -> None:
    environ = {key: value for key, value in (STEP | other).items() if value is not None}
    before = dict(environ)
    assert not environment.set_rank_variables(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SLURM_PROCID", "x", "must be a number"),
        ("SLURM_PROCID", "-1", "must be a number"),
        ("SLURM_STEP_ID", "٣", "must be a number"),
        ("SLURM_STEP_NUM_TASKS", None, "missing"),
        ("SLURM_LOCALID", "", "must be a number"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(y2)", "2(x3),1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2", "SLURM_NODEID"),
        ("SLURM_STEP_NODELIST", "n[1-", "brackets"),
        ("SLURM_STEP_NODELIST", "", "empty"),
    ],
)
def test_bad_variables_are_refused_by_name(name: str, value: str | None, words: str) -> None:
    environ = {key: text for key, text in (STEP | {name: value}).items() if text is not None}
    with pytest.raises(ConfigError) as error:
        environment.set_rank_variables(environ)
    assert name in str(error.value)
    assert words in str(error.value)
    assert "RANK" not in environ, "all or nothing"


def test_bad_variables_end_a_run_with_code_2_said_once(root: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(root / "sffn_dist/pretrain.py"),
        "--config",
        str(root / "configs/demo.json"),
    ]
    for rank in ("0", "1"):
        environment = os.environ | STEP | {"SLURM_PROCID": rank, "SLURM_NODEID": "zero"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.count("SLURM_NODEID") == (rank == "0"), done.stderr


# -------------------------------------------------------------------------------------------------- interface


def test_the_interface_is_that_of_the_route_and_never_loopback() -> None:
    assert environment.interface_to(["localhost", "127.0.1.1", "no.such.host.invalid"]) is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no route to anywhere")
    name = environment.interface_to(["localhost", "192.0.2.1"])
    assert name in {label for _, label in socket.if_nameindex()} - {"lo"}


@pytest.mark.parametrize(("ranks", "expected"), [("2", None), ("4", "eth7")])
def test_interfaces_are_set_with_several_nodes_only(
    ranks: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another launcher started the ranks: gloo would listen on the address of the host's name
    all the same.
    """
    monkeypatch.setattr(
        environment, "interface_to", lambda names: "eth7" if names[:2] == ["n9", "n1"] else None
    )
    environ = {
        "RANK": "0",
        "WORLD_SIZE": ranks,
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "n9",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    environment.set_rank_variables(environ)
    assert environ.get("GLOO_SOCKET_IFNAME") == expected
    assert environ.get("NCCL_SOCKET_IFNAME") == (expected and f"={expected}")


# -------------------------------------------------------------------------------------------------- notations


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[01-03,7],m2", ["n01", "n02", "n03", "n7", "m2"]),
        ("r[1-2]n[09-10]-ib", ["r1n09-ib", "r1n10-ib", "r2n09-ib", "r2n10-ib"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_hosts(text: str, names: list[str]) -> None:
    assert environment.hosts(text) == names


@pytest.mark.parametrize(
    "text", ["", "a,,b", "n[1-", "n1]", "n[[1]]", "n[a]", "n[3-1]", "n[]", "n[1-99999999]", "a b"]
)
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        environment.hosts(text)


name_parts = st.from_regex(r"[a-z]{1,4}", fullmatch=True)
numbers = st.integers(0, 120)


@st.composite
def host_lists(draw: st.DrawFn, tails: tuple[str, ...] = ("", "-ib", ".x")) -> tuple[str, list[str]]:
    """A list in Slurm's notation, and its names."""
    texts, names = [], []
    for _ in range(draw(st.integers(1, 3))):
        head, tail = draw(name_parts), draw(st.sampled_from(tails))
        if draw(st.booleans()):
            texts.append(head + tail)
            names.append(head + tail)
            continue
        items, width = [], draw(st.integers(1, 4))
        for _ in range(draw(st.integers(1, 3))):
            first = draw(numbers)
            last = first + draw(st.integers(0, 12))
            items.append(str(first).zfill(width) + (f"-{str(last).zfill(width)}" if last > first else ""))
            names += [f"{head}{str(number).zfill(width)}{tail}" for number in range(first, last + 1)]
        texts.append(f"{head}[{','.join(items)}]{tail}")
    return ",".join(texts), names


@settings(deadline=None)
@given(host_lists())
def test_any_list_of_hosts(case: tuple[str, list[str]]) -> None:
    text, names = case
    assert environment.hosts(text) == names


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs slurm-client")
def test_hosts_as_slurm_reads_them(tmp_path: Path) -> None:
    """scontrol needs a configuration for anything at all, but no daemon."""
    (tmp_path / "slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\nNodeName=n1\n")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    variables["SLURM_CONF"] = str(tmp_path / "slurm.conf")

    @settings(max_examples=50, deadline=None)  # a process each
    @given(host_lists(tails=("",)))  # it shows nothing for n[1]-ib
    def agree(case: tuple[str, list[str]]) -> None:
        text, _ = case
        done = subprocess.run(
            ["scontrol", "show", "hostnames", text], env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert environment.hosts(text) == done.stdout.split()

    agree()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 5)), min_size=1, max_size=5))
def test_tasks_per_node(groups: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert environment.tasks_per_node(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 50))
def test_ports(job: int, step: int) -> None:
    assert 20000 <= ports.rendezvous_port(job, step) < 32000
    assert (
        len(
            {
                ports.rendezvous_port(job, step),
                ports.rendezvous_port(job, step + 1),
                ports.rendezvous_port(job + 1, step),
            }
        )
        == 3
    )
