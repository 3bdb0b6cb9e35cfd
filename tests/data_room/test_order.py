"""Which samples form a batch: a pure function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sffn_dist.data.batches import Batches, heldout_batches, permute
from sffn_dist.spec.config import ConfigError


@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40))
@settings(deadline=None, max_examples=80)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    out = permute(np.arange(size, dtype=np.uint64), size, seed, epoch)
    assert np.array_equal(np.sort(out), np.arange(size, dtype=np.uint64))


def test_permutation_shuffles_and_depends_on_seed_and_epoch() -> None:
    size = 1001
    indices = np.arange(size, dtype=np.uint64)
    orders = [
        permute(indices, size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 10), (1, 1))
    ]
    for order in orders:
        assert abs(np.corrcoef(indices, order)[0, 1]) < 0.15
        assert np.mean(np.diff(order.astype(np.int64)) == 1) < 0.02
    for i, one in enumerate(orders):
        assert all((one == other).mean() < 0.02 for other in orders[:i])


def test_every_window_is_as_likely_to_come_first() -> None:
    size, epochs = 7, 2100
    first = [int(permute(np.zeros(1, dtype=np.uint64), size, 5, epoch)[0]) for epoch in range(epochs)]
    counts = np.bincount(first, minlength=size)
    assert ((counts - epochs / size) ** 2).sum() / (epochs / size) < 30  # chi-square, 6 degrees of freedom


def test_permutation_of_a_huge_size_needs_no_table() -> None:
    size = 2**45 + 3
    out = permute(np.arange(1000, dtype=np.uint64), size, 0, 0)
    assert len(set(out.tolist())) == 1000
    assert int(out.max()) < size
    assert int(out.max()) > 2**44


@given(
    windows=st.integers(1, 60), sequence=st.integers(1, 9), batch=st.integers(1, 40), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=60)
def test_an_epoch_visits_every_window_once(windows: int, sequence: int, batch: int, seed: int) -> None:
    tokens = np.arange(windows * sequence + 1 + seed % sequence)
    batches = Batches(tokens, sequence, batch, seed)
    assert batches.windows == windows
    steps = -(-3 * windows // batch)
    seen = np.concatenate([batches.samples(step) for step in range(steps)])
    for epoch in range(3):
        part = seen[epoch * windows : (epoch + 1) * windows]
        assert np.array_equal(np.sort(part), np.arange(windows))
    rows = batches.at(0).reshape(batch, sequence + 1)
    expected = batches.samples(0)[:, None] * sequence + np.arange(sequence + 1)
    assert np.array_equal(rows, expected)


@given(
    step=st.integers(0, 10**6),
    world=st.sampled_from([1, 2, 3, 4, 6, 12]),
    micro=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_the_global_batch_does_not_depend_on_the_layout(step: int, world: int, micro: int, seed: int) -> None:
    batches = Batches(np.arange(1009), 8, 48, seed)
    whole = batches.at(step)
    assert whole.shape == (1, 48, 9)
    assert whole.dtype == np.int64
    parts = [batches.at(step, rank, world, micro) for rank in range(world)]
    assert all(part.shape == (48 // world // micro, micro, 9) for part in parts)
    assert np.array_equal(np.concatenate([part.reshape(-1, 9) for part in parts]), whole[0])


@given(first=st.integers(0, 300), step=st.integers(0, 60))
def test_a_later_first_sample_goes_on_with_the_same_sequence(first: int, step: int) -> None:
    """init_from.data: the next samples after another run's last, over the ends of epochs too."""
    tokens = np.arange(37 * 4 + 1, dtype=np.uint16)
    whole = Batches(tokens, 4, 1, 5)
    later = Batches(tokens, 4, 3, 5, first)
    expected = [int(whole.samples(first + 3 * step + i)[0]) for i in range(3)]
    assert later.samples(step).tolist() == expected


def test_at_refuses_what_does_not_divide() -> None:
    batches = Batches(np.arange(100), 8, 6, 0)
    with pytest.raises(
        ConfigError, match=r"train\.global_batch_size = 6: must be a multiple of .* = 2 x 2 = 4"
    ):
        batches.at(0, 0, 2, 2)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 6"):
        batches.at(0, 0, 4)
    with pytest.raises(ValueError, match="rank 2"):
        batches.at(0, 2, 2)
    with pytest.raises(ValueError, match="step -1"):
        batches.at(-1)


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_stream_shorter_than_a_window_is_refused(length: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"model\.sequence = 8: must be below the number of training tokens .* {length} "
    ):
        Batches(np.arange(length), 8, 2, 0)
    with pytest.raises(ConfigError, match=r"model\.sequence = 8: .*held-out"):
        heldout_batches(np.arange(length), 8, 4, 2)


@given(windows=st.integers(1, 50), count=st.integers(1, 80), batch=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_heldout_windows_are_distinct_and_spread(windows: int, count: int, batch: int) -> None:
    tokens = np.arange(windows * 4 + 1)
    got = list(heldout_batches(tokens, 4, count, batch))
    assert all(len(part) == batch for part in got[:-1])
    starts = np.concatenate(got)[:, 0] // 4
    assert len(starts) == len(set(starts.tolist())) == min(count, windows)
    gaps = np.diff(starts)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
