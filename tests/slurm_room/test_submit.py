"""tools/submit.py without a Slurm: what the scripts say, what is refused, what a sweep comes to."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.cluster import __main__ as questions
from sffn_dist.cluster import job, sweep

DEMO = ("--config", "configs/demo.json", "train.micro_batch_size=1")
SIZE = ("--nodes", "2", "--gpus-per-node", "8", "--time", "12:00:00")
BASH = shutil.which("bash") or "bash"
SETTINGS = (
    "LAUNCHER",
    "REPOSITORY",
    "VENV",
    "INTERFACE",
    "CONTAINER",
    "MOUNTS",
    "CHAIN",
    "ARGUMENTS",
    "RUN_DIR",
)


@dataclass(frozen=True)
class Said:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def submit(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """tools/submit.py, called; where there is no sbatch."""
    spec = importlib.util.spec_from_file_location("submit", root / "tools/submit.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv("PATH", "/nowhere")

    def call(*words: str, cwd: Path = root) -> Said:
        monkeypatch.chdir(cwd)
        code = tool.main(list(words))
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def script_of(submit: Callable[..., Said]) -> Callable[..., str]:
    """The script that a dry run prints, which bash can read."""

    def call(*words: str, cwd: Path | None = None) -> str:
        done = submit(*words, **({"cwd": cwd} if cwd else {}))
        assert done.returncode == 0, done.stderr
        checked = subprocess.run([BASH, "-n"], input=done.stdout, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr
        return done.stdout

    return call


def directives(script: str) -> dict[str, str]:
    return dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )


def evaluated(script: str, *names: str, **variables: str) -> list[list[str]]:
    """Values of a script's settings, as bash reads them."""
    head = script[: script.index(f"\n{job.BODY}")]
    shown = "\n".join(f'printf "%s\\0" "${{{name}[@]}}"; printf "\\1\\0"' for name in names)
    done = subprocess.run(
        [BASH, "-c", f"{head}\n{shown}"], env=variables, capture_output=True, text=True, check=True
    )
    return [part.split("\0")[:-1] for part in done.stdout.split("\1\0")[:-1]]


# ---------------------------------------------------------------------------------------------------- one run


def test_a_script_says_what_was_asked(root: Path, tmp_path: Path, script_of: Any) -> None:
    folder = tmp_path / "a folder 100%"
    folder.mkdir()
    config = root / "configs/demo.json"
    run = ("train.micro_batch_size=1", "run.dir=my runs/it's", "sample.prompt=$HOME `x`")
    more = (
        "--partition",
        "h100",
        "--account",
        "me",
        "--qos",
        "long",
        "--constraint",
        "a&b",
        "--cpus-per-rank",
        "12",
    )
    more += ("--sbatch=--exclusive", "--interface", "ib0", "--grace", "600", "--launcher", "deepspeed")
    script = script_of("--config", str(config), *SIZE, *more, *run, cwd=folder)
    found = directives(script)
    wanted = {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "12:00:00",
        "signal": "B:USR1@600",
    }
    wanted |= {
        "partition": "h100",
        "account": "me",
        "qos": "long",
        "constraint": "a&b",
        "cpus-per-task": "12",
    }
    wanted |= {
        "requeue": "",
        "open-mode": "append",
        "exclusive": "",
        "job-name": "demo",
        "chdir": f'"{folder}"',
    }
    assert found == wanted | {"output": f'"{folder}/my runs/it\'s/logs/%j.log"'.replace("100%/", "100%%/")}
    assert evaluated(script, *SETTINGS) == [
        *(["deepspeed"], [str(root)], [sys.prefix], ["ib0"], [""]),
        *([str(root), str(folder)], [""]),
        ["--config", str(config), *run],
        ["my runs/it's"],
    ]
    assert not list(folder.iterdir()), "a dry run writes nothing"


def test_the_body_is_the_one_that_sbatch_takes_directly(root: Path, script_of: Any) -> None:
    template = (root / "slurm/pretrain.sbatch").read_text()
    script = script_of(*DEMO, *SIZE)
    assert script[script.index(job.BODY) :] == template[template.index(job.BODY) :]
    assert "SBATCH" not in template[template.index(job.BODY) :]
    # what a written script sets is what the file by itself sets: the body runs with set -u
    assigned = re.findall(r"^([A-Z_]+)=", template[: template.index(job.BODY)], flags=re.MULTILINE)
    assert sorted(assigned) == sorted(SETTINGS)
    heads = re.findall(r"^([A-Z_]+)=|\b(ARGUMENTS)=", script[: script.index(job.BODY)], flags=re.MULTILINE)
    assert sorted(a or b for a, b in heads) == sorted(SETTINGS)
    same = {"signal", "requeue", "open-mode"}
    assert {k: directives(template)[k] for k in same} == {k: directives(script)[k] for k in same}


def test_ranks_on_cpus_ask_for_no_gpus(root: Path, script_of: Any) -> None:
    found = directives(
        script_of(*DEMO, "--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "4", "--time", "30")
    )
    assert found["ntasks-per-node"] == "4"
    assert "gpus-per-node" not in found
    assert "cpus-per-task" not in found


def test_ranks_with_gpus_ask_for_cores(root: Path, script_of: Any) -> None:
    """The script by itself does too: where nothing is said many clusters give one."""
    template = (root / "slurm/pretrain.sbatch").read_text()
    for script in (template, script_of(*DEMO, *SIZE)):
        assert directives(script)["cpus-per-task"] == str(job.CORES)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("images/sffn.sif", ["apptainer exec --nv --pwd", "--bind"]),
        (
            "nvcr.io#nvidia/pytorch:25.01-py3",
            ["--container-image=", "--container-mounts=", "--container-workdir="],
        ),
    ],
)
def test_containers(root: Path, tmp_path: Path, image: str, words: list[str], script_of: Any) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("text")
    script = script_of(
        *DEMO,
        *SIZE,
        "--container",
        image,
        "--mount",
        "/scratch/x",
        f"data.source={corpus}",
        "run.dir=/fast/run",
    )
    container, mounts = evaluated(script, "CONTAINER", "MOUNTS")
    assert container == [str(root / image) if image.endswith(".sif") else image]
    assert {str(root), "/scratch/x", str(corpus), "/fast/run"} <= set(mounts)
    assert len(mounts) == len(set(mounts)) == 4, "the data's folder is inside the project's"
    # what the body makes of it: srun is a stand-in that shows its arguments
    body = script[script.index("# ---- what runs where") : script.index("cluster() {")]
    setting = (
        f"CONTAINER={shlex.quote(container[0])}; MOUNTS=({shlex.join(mounts)}); "
        f"VENV=/none; refuse() {{ exit 9; }}"
    )
    shown = subprocess.run(
        [BASH, "-uc", f'{setting}\n{body}\nprintf "%s " "${{IMAGE[@]}}" "${{INSIDE[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert all(word in shown for word in [*words, container[0], "/scratch/x"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--nodes", "0"), "--nodes = 0"),
        (("--gpus-per-node", "0"), "--ranks-per-node = 0"),
        (("--time", "soon"), "--time = 'soon'"),
        (("--time", "5"), "--grace = 300 s"),
        (("--grace", "70000", "--time", "9-0"), "--grace = 70000"),
        (("--partition", "a b"), "--partition = 'a b'"),
        (("--max-parallel", "2"), "--max-parallel = 2"),
        (("--chain", "0"), "--chain = 0"),
        (("--sbatch", "exclusive"), "--sbatch = 'exclusive'"),
        (("ffn.knd=dense",), "the nearest known one is ffn.kind"),
        (("parallel.tensor=3",), "parallel.tensor = 3"),
        (("--nodes", "3"), "train.global_batch_size = 16"),
        (("data.source=/no/such/place",), "data.source"),
        (("init_from=/no/such/place",), "init_from"),
    ],
)
def test_refusals_come_before_anything_is_submitted(
    root: Path, words: tuple[str, ...], says: str, submit: Any
) -> None:
    done = submit(*DEMO, *SIZE, "--submit", *words)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert done.stderr.startswith("submit.py: error: ")
    assert "sbatch cannot be run" not in done.stderr
    assert not done.stdout


def test_without_sbatch_it_is_said(root: Path, tmp_path: Path, submit: Any) -> None:
    words = ("--gpus-per-node", "2", "--time", "30", f"run.dir={tmp_path}/run", "--submit")
    done = submit(*DEMO, *words)
    assert done.returncode == 1
    assert "sbatch cannot be run" in done.stderr


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_time_limits(days: int, hours: int, minutes: int, seconds: int) -> None:
    whole = ((days * 24 + hours) * 60 + minutes) * 60
    assert job.seconds(f"{days}-{hours}:{minutes:02}:{seconds:02}") == whole + seconds
    assert job.seconds(f"{days}-{hours}:{minutes:02}") == whole
    assert job.seconds(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert job.seconds(f"{hours}:{minutes:02}:{seconds:02}") == (hours * 60 + minutes) * 60 + seconds
    assert job.seconds(f"{minutes}:{seconds:02}") == minutes * 60 + seconds
    assert job.seconds(str(minutes)) == minutes * 60
    assert job.seconds("unlimited") is None


def test_the_scripts_are_shell(root: Path) -> None:
    scripts = [root / "slurm" / name for name in ("pretrain.sbatch", "start.sh", "environment.sh")]
    assert subprocess.run([BASH, "-n", *map(str, scripts)], capture_output=True).returncode == 0
    checker = shutil.which("shellcheck")
    if checker:
        done = subprocess.run(
            [checker, *map(str, scripts), str(root / "tests/slurm_room/cluster.sh")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout


def test_the_environment_report_shows_no_secret(root: Path) -> None:
    secrets = {
        "SLURM_JWT": "abc1",
        "SLURM_API_TOKEN": "abc2",
        "NCCL_KEY": "abc3",
        "HF_TOKEN": "abc4",
        "CUDA_PASSWORD": "abc5\nSLURM_X=abc6",
    }
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "NCCL_DEBUG": "INFO", **secrets}
    done = subprocess.run(
        [BASH, str(root / "slurm/environment.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert "abc" not in done.stdout
    assert "SLURM_JWT=(not shown)" in done.stdout
    assert "NCCL_DEBUG=INFO" in done.stdout
    for word in (
        "date",
        "node",
        "kernel",
        "gpu",
        "revision",
        "python",
        "torch",
        "megatron-core",
        "deepspeed",
    ):
        assert re.search(rf"^{word} +\S", done.stdout, flags=re.MULTILINE), word
    assert not done.stderr, done.stderr


# ----------------------------------------------------------------------------------------------------- sweeps


def test_the_example_is_sizes_by_structures_by_learning_rates(root: Path, script_of: Any) -> None:
    script = script_of("--sweep", "slurm/sweep.json", "--max-parallel", "4", "--nodes", "1", *SIZE[2:])
    tree = json.loads((root / "slurm/sweep.json").read_text())
    runs = sweep.expand(sweep.read(root / "slurm/sweep.json"), [], 8)
    axes = [len(values) for values in tree["grid"].values()]
    assert len(tree["configs"]) > 1
    assert len(axes) == 2
    assert min(axes) > 1
    assert directives(script)["array"] == f"0-{len(runs) - 1}%4"
    assert directives(script)["output"].endswith(f"/runs/{tree['name']}/logs/%A_%a.log")
    assert len({run.run_dir for run in runs}) == len(runs)
    for number in (0, len(runs) - 1):
        arguments, run_dir = evaluated(script, "ARGUMENTS", "RUN_DIR", SLURM_ARRAY_TASK_ID=str(number))
        assert arguments == runs[number].arguments
        assert run_dir == [runs[number].run_dir]


def test_config_and_sweep(root: Path, tmp_path: Path, script_of: Any, submit: Any) -> None:
    """--config serves a sweep that names no configs, and no other."""
    bare = tmp_path / "sweep.json"
    bare.write_text(json.dumps({"name": "x", "grid": {"train.seed": [1, 2]}}))
    found = directives(script_of(*DEMO, "--sweep", str(bare), *SIZE))
    assert found["array"] == "0-1"
    done = submit(*DEMO, "--sweep", "slurm/sweep.json", *SIZE)
    assert done.returncode == 2
    assert "leave one out" in done.stderr
    assert submit(*SIZE).returncode == 2


# -------------------------------------------------------------------------------------- questions of the body


def test_deepspeeds_launcher_is_told_of_all_nodes_and_of_this_ones_devices() -> None:
    def told(*words: Any) -> Any:
        return json.loads(base64.urlsafe_b64decode(questions.world_info(*words)))

    assert told(1, 2, ["a", "b"], None) == {"a": [0, 1], "b": [0, 1]}
    assert told(1, 2, ["a", "b"], "2,3") == {"a": [0, 1], "b": [2, 3]}
    assert told(0, 2, ["a", "b"], "0,1,2,3") == {"a": [0, 1], "b": [0, 1]}
    assert told(0, 2, ["a"], "GPU-x,GPU-y") == {"a": ["GPU-x", "GPU-y"]}


def test_where_a_run_writes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(root / "configs/demo.json")
    assert questions.main(["run-dir", "--config", config]) == 0
    assert questions.main(["run-dir", "train.steps=5", "--config", config, "run.dir=a b"]) == 0
    assert capsys.readouterr().out == "runs/demo\na b\n"
    assert questions.main(["run-dir", "--config", config, "train.stps=5"]) == 2
    assert "train.stps" in capsys.readouterr().err
