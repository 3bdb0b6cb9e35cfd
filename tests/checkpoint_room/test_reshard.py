"""Resharding: the same tensors bit for bit, cut for any ranks, streamed; what does not fit is refused and
leaves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sffn_dist.checkpoint import reshard
from sffn_dist.checkpoint.manifest import KINDS, BrokenCheckpoint, Manifest
from sffn_dist.checkpoint.reader import Reader
from sffn_dist.conversion.verification import differences
from sffn_dist.parallel.split import shard
from sffn_dist.spec import loading
from sffn_dist.spec.config import Config, ConfigError
from sffn_dist.spec.split_table import model_tensors

FFN: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "low_rank": {"kind": "low_rank", "rank": 6},
    "block_dense": {"kind": "block_dense", "rank": 8, "blocks": 4},
    "block_shuffle": {"kind": "block_shuffle", "blocks": 4},
}


def config(kind: str, **model: Any) -> Config:
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "sequence": 8, "vocab": 32, **model}
    guide = {"mode": "fixed_step", "fraction": 0.5}
    tree = {
        "model": sizes,
        "ffn": {"width": 32, **FFN[kind]},
        "guide": guide,
        "train": {"steps": 10, "global_batch_size": 8},
    }
    return loading.from_tree(tree)


def tensor(name: str, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{kind}".encode()))
    return torch.randn(shape, generator=generator)


def checkpoint(
    folder: Path, of: Config, *, tensor_parallel: int = 1, data: int = 1, guide: bool = False
) -> Manifest:
    """A checkpoint of random tensors as tensor_parallel x data ranks would have written it."""
    specs = model_tensors(of, guide=guide)
    tree = of.model_dump(mode="json")
    tree["parallel"]["tensor"] = tensor_parallel
    header = Manifest(folder, 4, 3, 3 if guide else None, "data", tensor_parallel, KINDS, tree, {}, {}, {})
    return reshard.write(header, lambda name, kind: tensor(name, kind, specs[name].shape), folder, data=data)


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", FFN)
def test_every_layout_and_back_has_the_same_bits(
    tmp_path: Path, kind: str, activation: str, guide: bool
) -> None:
    """1 -> 2 -> 4 -> 1, with other numbers of files; each file holds just what the split table says that
    rank holds.
    """
    of = config(kind, activation=activation, tie_embeddings=activation == "gelu")
    first = last = checkpoint(tmp_path / "first", of, guide=guide and kind != "dense")
    specs = model_tensors(of, guide=guide and kind != "dense")
    for p, data in ((2, 1), (4, 3), (1, 2)):
        last = reshard.reshard(last, tmp_path / f"{p}", tensor=p, data=data)
        assert list(differences(first, last)) == []
        assert last.damage(last.files) == []
        assert (last.step, last.optimizer_steps, last.guide_optimizer_steps) == (
            4,
            3,
            first.guide_optimizer_steps,
        )
        assert last.config["parallel"]["tensor"] == last.tensor_parallel == p
        held = load_file(last.folder / f"rank_{p - 1:05d}.safetensors")
        for name, spec in specs.items():
            if data == 1 and spec.cut is not None:
                expected = shard(tensor(name, "exp_avg", spec.shape), spec, p, p - 1).view(-1)
                assert torch.equal(held[f"exp_avg/{name}/{p - 1}/0"], expected)
    assert (tmp_path / "1" / "rank_00001.safetensors").exists()


def test_one_flipped_bit_is_a_difference(tmp_path: Path) -> None:
    of = config("low_rank")
    one = checkpoint(tmp_path / "a", of)
    specs = model_tensors(of, guide=False)

    def changed(name: str, kind: str) -> torch.Tensor:
        made = tensor(name, kind, specs[name].shape)
        if (name, kind) == ("decoder.layers.1.mlp.linear_fc2.up", "exp_avg_sq"):
            made.view(-1)[3] = torch.nextafter(made.view(-1)[3], torch.tensor(9.0))
        return made

    other = reshard.write(one, changed, tmp_path / "b")
    found = list(differences(one, other))
    assert [item.tensor for item in found] == ["exp_avg_sq of decoder.layers.1.mlp.linear_fc2.up"]
    assert 0 < found[0].largest < 1e-5


SHARED: dict[tuple[str, int, int], Reader] = {}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shelf")


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_range_of_any_part_of_any_layout(shelf: Path, data: st.DataObject) -> None:
    """What a rank of p' x d' reads from a checkpoint of p x d ranks is its range of the tensor."""
    kind = data.draw(st.sampled_from(sorted(FFN)))
    p, d = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 5))
    if (kind, p, d) not in SHARED:
        made = checkpoint(shelf / f"{kind}-{p}-{d}", config(kind), tensor_parallel=p, data=d)
        SHARED[kind, p, d] = Reader(made)
    reader = SHARED[kind, p, d]
    name, spec = data.draw(st.sampled_from(sorted(reader.specs.items())))
    ranks = data.draw(st.sampled_from([1, 2, 4]))
    rank = data.draw(st.integers(0, ranks - 1))
    whole = tensor(name, "weight", spec.shape)
    expected = shard(whole, spec, ranks, rank).view(-1)
    start = data.draw(st.integers(0, expected.numel()))
    stop = data.draw(st.integers(start, expected.numel()))
    assert torch.equal(reader.local(name, "weight", ranks, rank, start, stop), expected[start:stop])


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", config("block_shuffle"))
    with pytest.raises(ConfigError, match=r"model\.heads = 4: must be divisible by parallel\.tensor = 3"):
        reshard.reshard(source, tmp_path / "b", tensor=3)
    with pytest.raises(ConfigError, match="exists already"):
        reshard.reshard(source, source.folder, tensor=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (source.folder / "rank_00000.safetensors").write_bytes(
        b"x" * source.files["rank_00000.safetensors"].bytes
    )
    with pytest.raises(BrokenCheckpoint, match="rank_00000"):
        reshard.reshard(source, tmp_path / "b", tensor=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_missing_pieces_are_found(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "a", config("low_rank"), data=2)
    name = "decoder.layers.1.mlp.linear_fc1.up"
    pieces = {**source.pieces, name: source.pieces[name][:1]}
    broken = Manifest(**{**vars(source), "pieces": pieces})
    with pytest.raises(BrokenCheckpoint, match=f"weight of {name} has 96 of 192 elements"):
        Reader(broken).full(name)


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """Twice the largest tensor and a constant, whatever the size of the model: here it has 12 times as
    much.
    """
    script = """
        import sys, threading, time
        from pathlib import Path
        from sffn_dist.checkpoint import reshard
        from sffn_dist.checkpoint.manifest import Manifest

        def anonymous():
            found = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
            return 1024 * int(found.split()[1])

        def watch():
            while True:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.001)

        source = Manifest.read(Path(sys.argv[1]))
        reshard.reshard(source, Path(sys.argv[2]), tensor=1)  # what is allocated once
        peak, before = [0], anonymous()
        threading.Thread(target=watch, daemon=True).start()
        reshard.reshard(source, Path(sys.argv[3]), tensor=4, data=2)
        print(peak[0] - before)
    """
    of = config("low_rank", width=256, vocab=32_768, layers=16)
    source = checkpoint(tmp_path / "a", of, tensor_parallel=2)
    largest = 4 * max(spec.numel for spec in model_tensors(of, guide=False).values())
    assert source.bytes > 3 * largest
    command = [sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(script)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # as tools/convert.py sets it
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in "abc")],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * largest + (16 << 20), json.loads(done.stdout) / largest
