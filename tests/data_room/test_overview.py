"""What the plan and the log say of a run's data."""

import json
from collections.abc import Callable
from pathlib import Path

from sffn_dist.data import metadata
from sffn_dist.data.overview import epochs_line, overview
from sffn_dist.data.prepare import prepare
from sffn_dist.spec.config import Config
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
    tokens = metadata.read_meta(folder).train.tokens
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
