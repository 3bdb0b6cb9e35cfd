"""What the plan and the log say of a run's data."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sffn_dist.data import meta_file
from sffn_dist.data.overview import epochs_line, overview, resolve_epochs, resolve_prepared
from sffn_dist.data.prepare import prepare
from sffn_dist.spec import schedule, validation
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.loading import from_tree
from sffn_dist.spec.plan import plan, render


def _longer(config: Config, steps: int) -> Config:
    tree = config.model_dump(mode="json")
    return from_tree({**tree, "train": {**tree["train"], "steps": steps, "global_batch_size": 8}})


def test_the_plan_counts_passes(texts: Path, configure: Callable[..., Config]) -> None:
    (texts / "notes.md").write_text("x")
    (texts / "rows.jsonl").write_text('{"text": ""}\n' * 3 + '{"text": "some text"}\n')
    config = _longer(configure(texts), 5000)
    before = overview(config)
    assert (before["epochs"], before["train_tokens"]) == (None, None)
    assert before["contents"] == [
        "reads 1 .jsonl, 60 .txt",
        "does not read 1 not a format that is read: notes.md",
    ]
    assert "not prepared yet" in render({**plan(config, 1), "data": before})
    folder = prepare(config)
    after = json.loads(json.dumps(overview(config)))
    tokens = meta_file.read_meta(folder).train.tokens
    epochs = 5000 * 8 / ((tokens - 1) // 16)
    assert after["train_tokens"] == tokens
    assert abs(after["epochs"] - epochs) < 1e-9
    page = render({**plan(config, 1), "data": after})
    assert f"passes over the training data {epochs:.3g} times" in page
    assert "skipped: 3 empty documents" in page
    assert "notes.md" in page


def test_many_passes_are_a_warning(texts: Path, configure: Callable[..., Config]) -> None:
    config = _longer(configure(texts), 10)
    assert epochs_line(config, 161) == (
        "warning: data: 161 tokens to train on; 10 steps pass over them 8 times; more than 4 passes teach a "
        "model little that is new"
    )
    assert epochs_line(config, 1601) == "data: 1,601 tokens to train on; 10 steps pass over them 0.8 times"


def _of_epochs(config: Config, **train: object) -> Config:
    tree = config.model_dump(mode="json")
    return from_tree({**tree, "train": {**tree["train"], "global_batch_size": 8, **train}})


def test_epochs_stand_for_steps(texts: Path, configure: Callable[..., Config]) -> None:
    config = _of_epochs(configure(texts), steps=0, epochs=2.5)
    assert resolve_prepared(config) == config
    with pytest.raises(ConfigError, match=r"train\.epochs = 2\.5: its steps are known once data\.source is"):
        schedule.build_schedule(config)
    tokens = meta_file.read_meta(prepare(config)).train.tokens
    resolved = resolve_prepared(config)
    windows = (tokens - 1) // 16
    assert resolved.train.steps == -(-windows * 5 // 16)  # 2.5 passes, of 8 samples a step, rounded up
    assert 2.5 <= schedule.epochs(config, tokens, resolved.train.steps) < 2.5 + 8 / windows
    same = _of_epochs(config, steps=resolved.train.steps, epochs=None)
    assert resolved == same, "a run knows its steps alone"
    assert validation.identity(resolved) == validation.identity(same)
    assert resolve_epochs(same, 10**9) == same


def test_a_whole_number_of_steps_is_not_rounded_up(configure: Callable[..., Config]) -> None:
    config = _of_epochs(configure("stdlib"), steps=0, epochs=3)
    assert resolve_epochs(config, 16 * 80 + 1).train.steps == 30
    assert resolve_epochs(config, 16 * 81 + 1).train.steps == 31
    inexact = _of_epochs(configure("stdlib"), steps=0, epochs=8)
    assert resolve_epochs(inexact, 16 * 103 + 1).train.steps == 103  # 8 / (8 / 103) is 103.00000000000001
    with pytest.raises(
        ConfigError, match=r"model\.sequence = 16: must be below the number of training tokens"
    ):
        resolve_epochs(config, 16)


@pytest.mark.parametrize(
    ("train", "rule"),
    [
        ({"steps": 0}, r"^train\.steps = 0: must be greater than 0, or train\.epochs be set in its place$"),
        (
            {"steps": 5, "epochs": 2},
            r"^train\.epochs = 2: stands in place of train\.steps, which is 5; set one",
        ),
        ({"steps": 0, "epochs": 0}, r"^train\.epochs = 0: must be greater than 0$"),
    ],
)
def test_one_of_steps_and_epochs(configure: Callable[..., Config], train: dict[str, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        _of_epochs(configure("stdlib"), **train)


def test_what_resolved_steps_break_is_refused(configure: Callable[..., Config]) -> None:
    tree = _of_epochs(configure("stdlib"), steps=0, epochs=1).model_dump(mode="json")
    tree["ffn"] |= {"kind": "low_rank", "rank": 4, "dense_layers": []}
    tree["guide"] |= {"mode": "window", "end": 50}
    config = from_tree(tree)
    with pytest.raises(ConfigError, match=r"guide\.end = 50: must not exceed train\.steps = 10"):
        resolve_epochs(config, 16 * 80 + 1)


def test_a_run_of_epochs(tmp_path: Path, texts: Path) -> None:
    """Its steps are known once the data are prepared; it records them."""
    root = Path(__file__).parents[2]
    tree = {
        "model": {"layers": 1, "width": 16, "heads": 2, "sequence": 16, "vocab": 300},
        "data": {"source": str(texts)},
        "train": {"epochs": 0.01, "global_batch_size": 4, "micro_batch_size": 4},
        "sample": {"tokens": 1},
        "guards": {"preflight": False},
    }
    (tmp_path / "small.json").write_text(json.dumps(tree))

    def pretrain(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(root / "sffn_dist/pretrain.py"), "--config", "small.json", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment
        )

    planned = pretrain("--plan")
    assert planned.returncode == 2
    assert "train.epochs = 0.01: its steps are known once data.source is prepared" in planned.stderr
    done = pretrain()
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["identity"]["train.steps"] == recorded["config"]["train"]["steps"] == summary["steps"]
    assert 0.01 <= summary["epochs"] < 0.02
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == summary["epochs"]
    assert f"steps          {summary['steps']} of 64 tokens" in done.stdout, "the plan, once it is known"
    planned = pretrain("--plan", "--json")
    assert json.loads(planned.stdout)["steps"] == summary["steps"]
    refused = pretrain("train.epochs=0.05")
    assert refused.returncode == 2
    assert "run.dir = 'runs/small' holds a run with" in refused.stderr
