"""UTF-8 bytes of source text that each token of an encoding stands for.

A token's bytes run from where the tokens before it end, to its own end, by the encoder's offsets into the
text before normalization. So what a normalizer drops, joins or replaces counts with the token that follows
it, what a character of several tokens takes counts with the first of them, and the sum over a document is
its length, whatever the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sffn_dist.data.tokenizer import plain

Counts = NDArray[np.uint32]


def counting(tokenizer: Tokenizer) -> Tokenizer:
    """A copy whose offsets are whole: post-processors trim white space off them. Its ids are the same."""
    tree = json.loads(tokenizer.to_str())
    return plain(Tokenizer.from_str(json.dumps({**tree, "post_processor": None})))


def source_bytes(text: str, offsets: Sequence[tuple[int, int]], carried: int = 0) -> tuple[Counts, int]:
    """Bytes of each token of ``text``, (tokens,), and bytes after the last one, for what follows it.

    ``offsets``: of the tokens, in characters; ``carried``: bytes before the text that no token has yet.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + sum((characters > bound).astype(np.int64) for bound in (0x7F, 0x7FF, 0xFFFF))
    places = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # of each character, and of the end
    if not offsets:
        return np.zeros(0, dtype=np.uint32), carried + int(places[-1])
    ends: NDArray[Any] = np.maximum.accumulate(np.array([end for _, end in offsets], dtype=np.int64))
    counts = np.diff(places[ends], prepend=0)
    counts[0] += carried
    return counts.astype(np.uint32), int(places[-1] - places[ends[-1]])
