"""Step -> batch, with no state: which samples form a batch is a function of (seed, step) alone.

A sample is a window of ``sequence`` tokens and one more for the last label; windows do not overlap. N
windows, G samples a step: sample i of a step is number ``step * G + i`` of an endless sequence that visits,
epoch after epoch, each window once, in an order given by a keyed permutation of 0..N-1. So a run resumed at
any step, on any number of ranks, sees what it would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sffn_dist.spec.config import ConfigError
from sffn_dist.spec.schedule import windows as count_windows

_ROUNDS = 8


class TokenArray(Protocol):
    """A numpy array, or a :class:`sffn_dist.data.shards.TokenStream`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> Any: ...


# ------------------------------------------------------------------------------------------------ permutation


def permute(indices: NDArray[np.uint64], size: int, seed: int, epoch: int) -> NDArray[np.uint64]:
    """Where a pseudo-random permutation of 0..size-1, keyed by (seed, epoch), sends the indices; same shape.

    A Feistel network permutes the numbers of an even number of bits; a result outside 0..size-1 is sent
    through again until it is inside ("cycle walking", fewer than four passes on average), which permutes the
    rest. No table, whatever the size.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    digest = hashlib.blake2b(
        f"{seed}:{epoch}".encode(), key=b"sffn_dist sample order", digest_size=8 * _ROUNDS
    ).digest()
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    out = _feistel(indices, half, keys)
    while (outside := out >= np.uint64(size)).any():
        out[outside] = _feistel(out[outside], half, keys)
    return out


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of splitmix64); products wrap around, as meant."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------- batches


class Batches:
    """Training batches: ``batches.at(step)``; step 0 begins with sample ``first_sample`` of the endless
    sequence.

    Raises:
        ConfigError: fewer tokens than one sample needs.
    """

    def __init__(
        self, tokens: TokenArray, sequence: int, global_batch_size: int, seed: int, first_sample: int = 0
    ):
        self.first_sample = first_sample
        self.tokens, self.sequence, self.global_batch_size, self.seed = (
            tokens,
            sequence,
            global_batch_size,
            seed,
        )
        self.windows = _windows(tokens, sequence, "training")

    def samples(self, step: int) -> NDArray[np.int64]:
        """Windows that form the global batch of a step, in order; (global_batch_size,)."""
        if step < 0:
            raise ValueError(f"step {step}: must not be negative")
        out = np.empty(self.global_batch_size, dtype=np.int64)
        done = 0
        while done < len(out):
            epoch, start = divmod(self.first_sample + step * self.global_batch_size + done, self.windows)
            count = min(len(out) - done, self.windows - start)
            indices = np.arange(start, start + count, dtype=np.uint64)
            out[done : done + count] = permute(indices, self.windows, self.seed, epoch)
            done += count
        return out

    def at(
        self, step: int, rank: int = 0, world: int = 1, micro_batch_size: int | None = None
    ) -> NDArray[np.int64]:
        """What data-parallel rank ``rank`` of ``world`` trains on in a step: (micro_steps, micro_batch_size,
        sequence + 1).

        Inputs are ``[..., :-1]``, labels ``[..., 1:]``. A rank's share is a contiguous slice of the global
        batch, which does not depend on ``world`` or ``micro_batch_size`` (default: the whole share in one).

        Raises:
            ConfigError: the global batch does not divide into ranks and micro-batches.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank}: must be in 0..{world - 1}")
        micro = micro_batch_size or max(1, self.global_batch_size // world)
        if self.global_batch_size % (world * micro):
            raise ConfigError(
                [
                    f"train.global_batch_size = {self.global_batch_size}: must be a multiple of "
                    f"train.micro_batch_size x "
                    f"data-parallel ranks = {micro} x {world} = {micro * world}"
                ]
            )
        share = self.global_batch_size // world
        own_samples = self.samples(step)[rank * share : (rank + 1) * share]
        return _read(self.tokens, own_samples, self.sequence).reshape(
            share // micro, micro, self.sequence + 1
        )


def heldout_batches(tokens: TokenArray, sequence: int, count: int, batch: int) -> Iterator[NDArray[np.int64]]:
    """Held-out batches, each (at most ``batch``, sequence + 1): ``count`` evenly spaced windows, or all if
    there are fewer.

    Raises:
        ConfigError: fewer tokens than one window needs.
    """
    windows = _windows(tokens, sequence, "held-out")
    selected_count = min(count, windows)
    chosen = np.arange(selected_count, dtype=np.int64) * windows // max(selected_count, 1)
    return (
        _read(tokens, chosen[start : start + batch], sequence) for start in range(0, selected_count, batch)
    )


def read_heldout(tokens: TokenArray, sequence: int, count: int) -> NDArray[np.int64]:
    """All of :func:`heldout_batches` at once: (windows, S+1)."""
    return np.concatenate(list(heldout_batches(tokens, sequence, count, 64)))


def _windows(tokens: TokenArray, sequence: int, side: str) -> int:
    windows = count_windows(len(tokens), sequence)
    if windows < 1:
        raise ConfigError(
            [
                f"model.sequence = {sequence}: must be below the number of {side} tokens of data.source, "
                f"{len(tokens)} "
                "(a sample is model.sequence + 1 tokens)"
            ]
        )
    return windows


def _read(tokens: TokenArray, windows: NDArray[np.int64], sequence: int) -> NDArray[np.int64]:
    out = np.empty((len(windows), sequence + 1), dtype=np.int64)
    for row, window in enumerate(windows.tolist()):
        out[row] = tokens[window * sequence : (window + 1) * sequence + 1]
    return out
