"""Decoding by kernels and by plain torch against float64 formulas: sizes, structures, determinism,
counters, compilation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from sffn_kernels import decode, dispatch
from sffn_kernels.launching import Tile
from torch import Tensor

decode_triton = pytest.importorskip("sffn_kernels.decode_triton")
from sffn_kernels import partial_sums_triton  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
KINDS = ["low_rank", "block_dense", "block_shuffle"]
ACTIVATIONS = ["gelu", "gelu_erf", "swiglu"]
RANK, BLOCKS, INPUTS, WIDE, OUTPUTS = 96, 3, 150, 207, 111
Factors = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def by_kernels() -> Iterator[None]:
    """Kernels, whose counters are zero after each test."""
    torch.manual_seed(0)
    with dispatch.using("triton"), torch.no_grad():
        yield
    assert all(not buffer.any() for buffer in partial_sums_triton._zeros.values())


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).div(math.sqrt(shape[-1])).to(DEVICE, dtype)


def compare(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.is_contiguous()
    if got.numel():
        error = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < TOLERANCE[got.dtype]


# ----------------------------------------------------------------------------------- the formulas, in float64


def by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """y[k*O + o] = sum_i w[k, o, i] x[k*I + i]; dense: one block."""
    w = (weight if weight.dim() == 3 else weight[None]).double()
    return torch.einsum("tki,koi->tko", x.double().reshape(len(x), w.shape[0], w.shape[2]), w).flatten(1)


def shuffled(z: Tensor, weight: Tensor) -> Tensor:
    """y[s*L + l] = sum_r w[l, s, r] z[r*L + l]."""
    dealt = z.double().reshape(len(z), weight.shape[2], weight.shape[0])
    return torch.einsum("trl,lsr->tsl", dealt, weight.double()).flatten(1)


def second_factor(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = shuffled(z, weight) if weight.dim() == 3 else by_blocks(z, weight)
    return y if bias is None else y + bias.double()


def activated(y: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "gelu_erf":
        return y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    return y / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def layer(x: Tensor, factors: Factors, activation: str) -> Tensor:
    first1, second1, bias1, first2, second2, bias2 = factors
    features = activated(second_factor(by_blocks(x, first1), second1, bias1), activation)
    return second_factor(by_blocks(features, first2), second2, bias2)


# ---------------------------------------------------------------------------------------------------- drawing


def drawn(kind: str, activation: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> Factors:
    """A layer's factors, of sizes that are no multiple of a tile's."""
    wide = WIDE * (2 if activation == "swiglu" else 1)
    b = BLOCKS
    first1 = (
        draw(RANK, INPUTS, dtype=dtype)
        if kind == "low_rank"
        else draw(b, RANK // b, INPUTS // b, dtype=dtype)
    )
    first2 = (
        draw(RANK, WIDE, dtype=dtype) if kind == "low_rank" else draw(b, RANK // b, WIDE // b, dtype=dtype)
    )
    if kind == "block_shuffle":
        second1, second2 = (
            draw(b, wide // b, RANK // b, dtype=dtype),
            draw(b, OUTPUTS // b, RANK // b, dtype=dtype),
        )
    else:
        second1, second2 = draw(wide, RANK, dtype=dtype), draw(OUTPUTS, RANK, dtype=dtype)
    bias1, bias2 = (draw(wide, dtype=dtype), draw(OUTPUTS, dtype=dtype)) if bias else (None, None)
    return first1, second1, bias1, first2, second2, bias2


def dealt(z: Tensor, second: Tensor) -> Tensor:
    return z.unflatten(1, (-1, second.shape[0])).transpose(1, 2) if second.dim() == 3 else z


def strided(tensor: Tensor) -> Tensor:
    """The same values, no two of them neighbours."""
    out = tensor.new_full((*tensor.shape, 2), float("nan"))[..., 0]
    return out.copy_(tensor)


# ------------------------------------------------------------------------------------------------------ tests


@pytest.mark.parametrize("setting", ["triton", "torch"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp16"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_its_formula(kind: str, tokens: int, dtype: torch.dtype, setting: str) -> None:
    activation = ACTIVATIONS[tokens % 3]
    factors, x = drawn(kind, activation, dtype=dtype), draw(tokens, INPUTS, dtype=dtype) * 12
    with dispatch.using(setting):
        compare(decode.feed_forward(x, *factors, activation), layer(x, factors, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_bottleneck_of_any_strides(kind: str, activation: str, bias: bool) -> None:
    _, second, b, first, *_ = drawn(kind, activation, bias=bias)
    z = draw(5, RANK) * 10
    expected = by_blocks(activated(second_factor(z, second, b), activation), first)
    compare(decode.bottleneck(dealt(z, second), second, b, first, activation), expected)
    got = decode.bottleneck(
        strided(dealt(z, second)),
        strided(second),
        None if b is None else strided(b),
        strided(first),
        activation,
    )
    compare(got, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(70, 150), (BLOCKS, 20, RANK), (1, 1, 1)], ids=str)
def test_a_product_of_any_strides(shape: tuple[int, ...], bias: bool, interleaved: bool) -> None:
    weight = draw(*shape)
    k, outputs, inputs = weight.shape if weight.dim() == 3 else (1, *weight.shape)
    x, b = draw(7, k * inputs), draw(k * outputs) if bias else None
    expected = by_blocks(x, weight).reshape(7, k, outputs)
    expected = (expected.transpose(1, 2) if interleaved else expected).flatten(1) + (
        0 if b is None else b.double()
    )
    for given in (strided(x), x.reshape(7, k, inputs), x[:1].expand(7, -1)):
        flat = given.reshape(7, -1)
        right = expected if flat.equal(x) else expected[:1].expand(7, -1)
        compare(decode.product(given, weight, b, interleaved=interleaved), right)
    compare(
        decode.product(x, strided(weight), None if b is None else strided(b), interleaved=interleaved),
        expected,
    )


@pytest.mark.parametrize("tokens", [33])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tiling_gives_the_formula(kind: str, tokens: int) -> None:
    first1, second, b, first, *_ = drawn(kind, "swiglu")
    z = draw(tokens, RANK) * 10
    expected = by_blocks(activated(second_factor(z, second, b), "swiglu"), first)
    ways = decode_triton.bottlenecks(dealt(z, second), second, b, first, "swiglu")
    assert len(ways) == len(decode_triton.BOTTLENECK_CONFIGS) + (kind != "block_shuffle")
    for way in ways.values():
        compare(way(), expected)
    x = draw(tokens, INPUTS)
    weight = first1 if first1.dim() == 3 else first1[None]
    ways = decode_triton.products(x.reshape(tokens, len(weight), -1), weight, None, interleaved=False)
    assert len(ways) == len(decode_triton.CONFIGS)
    for way in ways.values():
        compare(way(), by_blocks(x, first1))


@pytest.mark.parametrize("scratch", [1, 1 << 15, 1 << 24])
@pytest.mark.parametrize(("kind", "cores"), [("low_rank", 132), ("block_shuffle", 132), ("block_dense", 4)])
def test_any_division_of_the_features_among_programs(
    monkeypatch: pytest.MonkeyPatch, kind: str, cores: int, scratch: int
) -> None:
    """One program that sums all tiles of features by itself, one each, and some of several; outputs in one
    chunk and in more.
    """
    monkeypatch.setattr(decode_triton, "BOTTLENECK_CONFIGS", (Tile(16, 16, 32, 4, 1),))
    monkeypatch.setattr(decode_triton, "REACH", 64)
    monkeypatch.setattr(decode_triton, "SCRATCH", scratch)
    monkeypatch.setattr(decode_triton, "cores", lambda device: cores)
    b = BLOCKS
    second, first = (
        (draw(b, 120, 8), draw(b, 70, 120)) if kind == "block_shuffle" else (draw(120, 24), draw(100, 120))
    )
    if kind == "block_dense":
        first = draw(b, 70, 40)
    for tokens in (2, 18):
        z = draw(tokens, 24) * 5
        expected = by_blocks(activated(second_factor(z, second, None), "gelu"), first)
        compare(decode.bottleneck(dealt(z, second), second, None, first, "gelu"), expected)


def test_blocks_that_cut_each_other() -> None:
    """The 15 features of a block of U, which two blocks of V cannot share."""
    factors = (draw(3, 4, 5), draw(2, 15, 6), draw(30), draw(2, 6, 15), draw(2, 7, 6), None)
    x = draw(4, 15)
    compare(decode.feed_forward(x, *factors, "gelu"), layer(x, factors, "gelu"))


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_same_bits(kind: str) -> None:
    factors, x = drawn(kind, "gelu"), draw(9, INPUTS)
    assert decode.feed_forward(x, *factors, "gelu").equal(decode.feed_forward(x, *factors, "gelu"))


def test_more_counters_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_sums_triton, "COUNTERS", 2)
    monkeypatch.setattr(partial_sums_triton, "_zeros", {})
    x, weight = draw(2, 300), draw(300, 300)
    for _ in range(2):
        compare(decode.product(x, weight), by_blocks(x, weight))
    assert not partial_sums_triton._zeros
    kept = partial_sums_triton.counters(DEVICE, 2)
    assert partial_sums_triton.counters(DEVICE, 1) is kept
    assert len(partial_sums_triton.counters(DEVICE, 3)) == 3


# --------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused() -> None:
    first1, second1, bias1, first2, *_ = drawn("low_rank", "gelu")
    with pytest.raises(ValueError, match="65 tokens: decoding takes at most 64"):
        decode.product(draw(65, INPUTS), first1)
    with pytest.raises(ValueError, match="65 tokens: decoding takes at most 64"):
        decode.bottleneck(draw(65, RANK), second1, bias1, first2, "gelu")
    with pytest.raises(ValueError, match=r"x \(2, 149\): must be \(T, 150\)"):
        decode.product(draw(2, INPUTS - 1), first1)
    with pytest.raises(ValueError, match=r"bias \(95,\): must be \(96,\)"):
        decode.product(draw(2, INPUTS), first1, draw(RANK - 1))
    with pytest.raises(ValueError, match=r"dtypes torch\.float32, torch\.float16: must be one"):
        decode.product(draw(2, INPUTS), first1.half())
    with pytest.raises(ValueError, match=r"z \(2, 95\): does not fit"):
        decode.bottleneck(draw(2, RANK - 1), second1, bias1, first2, "gelu")
    with pytest.raises(ValueError, match="swiglu of features"):
        decode.bottleneck(draw(2, RANK), second1, bias1, first2, "swiglu")
    with pytest.raises(ValueError, match="activation = 'relu'"):
        decode.bottleneck(draw(2, RANK), second1, bias1, first2, "relu")
    with pytest.raises(ValueError, match="do not fit a first factor"):
        decode.bottleneck(draw(2, 2, 6), draw(2, 15, 6), None, draw(2, 6, 15), "gelu")


def test_a_gradient_is_refused() -> None:
    x, weight = draw(2, 8), draw(4, 8).requires_grad_()
    compare(decode.product(x, weight), by_blocks(x, weight))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward"):
        decode.product(x, weight)


# ------------------------------------------------------------------------------------------------ compilation


def test_registered_as_torch_requires() -> None:
    _, second, bias, first, *_ = drawn("block_shuffle", "gelu")
    weights = draw(BLOCKS, 5, 6)
    for tokens in (0, 2):
        x = draw(tokens, 6, BLOCKS).transpose(1, 2)
        torch.library.opcheck(torch.ops.sffn.decode_product.default, (x, weights, draw(15), True))
        torch.library.opcheck(torch.ops.sffn.decode_product.default, (x, weights, None, False))
        given = (dealt(draw(tokens, RANK), second), second, bias, first, "gelu")
        torch.library.opcheck(torch.ops.sffn.decode_bottleneck.default, given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_the_layer(kind: str) -> None:
    factors, x = drawn(kind, "swiglu"), draw(2, INPUTS)
    compiled = torch.compile(decode.feed_forward, fullgraph=True, backend="aot_eager")
    assert compiled(x, *factors, "swiglu").equal(decode.feed_forward(x, *factors, "swiglu"))
