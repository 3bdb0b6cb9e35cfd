"""Tokens on disk: uint16 and uint32, several files, one sequence."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.data.meta_file import Split
from sffn_dist.data.shards import ShardWriter, TokenStream, token_dtype, unigram_entropy


def _stream(writer: ShardWriter) -> TokenStream:
    split = Split(documents=1, tokens=writer.tokens, bytes=0, shards=writer.finish())
    return TokenStream(writer.folder, split, writer.dtype)


@pytest.mark.parametrize(("vocab", "name"), [(300, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_the_highest_id_survives(tmp_path: Path, vocab: int, name: str) -> None:
    dtype = token_dtype(vocab)
    assert dtype == np.dtype(name)
    writer = ShardWriter(tmp_path, "train", dtype)
    writer.append(np.array([0, 1, vocab - 1]))
    assert _stream(writer)[:].tolist() == [0, 1, vocab - 1]


def test_an_id_too_high_is_refused_not_wrapped(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", token_dtype(300))
    for bad in (65_536, -1):
        with pytest.raises(OverflowError, match="do not fit uint16"):
            writer.append(np.array([5, bad]))


@given(
    parts=st.lists(st.integers(0, 25), min_size=1, max_size=8),
    shard=st.integers(1, 12),
    pop=st.integers(0, 60),
)
@settings(deadline=None, max_examples=60)
def test_several_files_read_as_one_sequence(
    tmp_path_factory: pytest.TempPathFactory, parts: list[int], shard: int, pop: int
) -> None:
    writer = ShardWriter(tmp_path_factory.mktemp("shards"), "train", token_dtype(300), shard)
    expected = np.arange(sum(parts))
    for part in np.split(expected, np.cumsum(parts)[:-1]):
        writer.append(part)
    pop = min(pop, len(expected))
    taken = writer.pop(pop)
    assert taken.tolist() == expected[len(expected) - pop :].tolist()
    expected = expected[: len(expected) - pop]
    if not len(expected):
        assert not writer.finish()
        return
    writer.append(np.array([299]))
    expected = np.append(expected, 299)
    stream = _stream(writer)
    assert len(stream) == len(expected)
    for start in range(0, len(expected), 3):
        assert stream[start : start + 7].tolist() == expected[start : start + 7].tolist()
        assert stream[start] == expected[start]
    assert stream[-1] == 299
    assert stream[:].tolist() == expected.tolist()
    with pytest.raises(IndexError):
        stream[len(expected)]


def test_unigram_entropy_in_nats() -> None:
    assert unigram_entropy(np.array([3] * 9), 5) == 0
    assert unigram_entropy(np.arange(8).repeat(5), 8) == pytest.approx(np.log(8))
