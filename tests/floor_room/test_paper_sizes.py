"""Parameters, FLOPs and recipes of every config file against the paper's published tables."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from sffn_dist.spec import counts, split_table
from sffn_dist.spec.config import Config
from sffn_dist.spec.loading import load
from sffn_dist.spec.memory import memory_per_rank
from sffn_dist.spec.schedule import build_schedule, equal_flops_fraction, flops

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAPER = sorted(path.stem for path in (CONFIGS / "paper").glob("*.json"))
ALL = sorted(path for path in CONFIGS.rglob("*.json"))

# size: layers, width, ffn, heads, billions of tokens, steps, learning rate
MODELS = {
    "s": (12, 768, 3072, 12, 2.2, 4196, 6e-4),
    "m": (24, 1024, 4096, 16, 6.7, 12779, 3e-4),
    "l": (24, 1536, 6144, 12, 14.58, 27809, 2.5e-4),
    "xl": (24, 2048, 8192, 16, 25.5, 48637, 2e-4),
}
# size: (rank, blocks) at 63% and 32%
STRUCTURES = {
    "low_rank": {s: ((2 * r, None), (r, None)) for s, r in {"s": 192, "m": 256, "l": 384, "xl": 512}.items()},
    "block_dense": {
        s: ((2 * r, b), (r, b))
        for s, (r, b) in {"s": (256, 2), "m": (384, 4), "l": (512, 2), "xl": (768, 4)}.items()
    },
    "block_shuffle": dict.fromkeys(MODELS, ((None, 2), (None, 4))),
}
# model: parameters in M, parameters of the FFN in M, training FLOPs
PUBLISHED = {
    "xl_dense": (1274, 805, 2.10e20),
    "xl_low_rank_63": (985, 516, 1.66e20),
    "xl_block_dense_63": (955, 486, 1.61e20),
    "xl_block_shuffle_63": (985, 516, 1.66e20),
    "xl_low_rank_32": (744, 275, 1.29e20),
    "xl_block_dense_32": (728, 260, 1.27e20),
    "xl_block_shuffle_32": (744, 275, 1.29e20),
    "s_dense": (109.5, None, 1.69e18),
    "s_low_rank_32": (73.8, None, 1.22e18),
    "m_dense": (334.8, None, 1.55e19),
    "m_low_rank_32": (202.1, None, 1.02e19),
    "m_block_dense_32": (198.3, None, None),
    "l_dense": (728.6, None, 7.03e19),
    "l_low_rank_32": (430.2, None, 4.42e19),
}


def paper(name: str) -> Config:
    return load(CONFIGS / "paper" / f"{name}.json")


def training_flops(config: Config) -> int:
    return (
        counts.flops_per_token(config)
        * config.model.sequence
        * config.train.global_batch_size
        * config.train.steps
    )


def test_every_size_and_kind_has_a_file() -> None:
    structured = {f"{size}_{kind}_{share}" for size in MODELS for kind in STRUCTURES for share in (63, 32)}
    assert set(PAPER) == structured | {f"{size}_dense" for size in MODELS}
    assert PUBLISHED.keys() <= set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_a_file_holds_what_its_name_says(name: str) -> None:
    match = re.fullmatch(r"(s|m|l|xl)_(dense|low_rank|block_dense|block_shuffle)(?:_(63|32))?", name)
    assert match
    size, kind, share = match.groups()
    layers, width, ffn, heads, billions, steps, rate = MODELS[size]
    got = paper(name)
    model, train = got.model, got.train
    assert (model.layers, model.width, got.ffn_width, model.heads, got.kv_heads) == (
        layers,
        width,
        ffn,
        heads,
        heads,
    )
    assert (got.ffn.kind, got.ffn.dense_layers, got.guide.mode) == (kind, (0,), "off")
    assert (got.ffn.rank, got.ffn.blocks) == (
        STRUCTURES[kind][size][share == "32"] if share else (None, None)
    )
    assert (train.steps, train.learning_rate) == (steps, rate)
    assert train.steps * train.global_batch_size * model.sequence == pytest.approx(billions * 1e9, rel=0.01)
    recipe = (
        train.weight_decay,
        train.beta1,
        train.beta2,
        train.clip,
        train.warmup_share,
        train.min_learning_rate_ratio,
    )
    assert recipe == (0.1, 0.9, 0.999, 1.0, 0.1, 0.1)
    fixed = (
        model.vocab,
        model.sequence,
        train.global_batch_size,
        model.rope_base,
        model.norm,
        model.activation,
        model.bias,
    )
    assert fixed == (32_000, 1024, 512, 10_000, "layernorm", "gelu", True)
    assert model.tie_embeddings


def matrices(config: Config, part: str = "") -> float:
    """Millions of parameters in matrices: no biases, no norms, no guide."""
    specs = split_table.model_tensors(config, guide=False).items()
    counts = [spec.numel for name, spec in specs if len(spec.shape) > 1 and part in name]
    return sum(counts) / 1e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name: str) -> None:
    """The authors' own counts (xl) hold biases in the total but not in the FFN's; the others come from the
    FLOP formula: matrices.
    """
    total, ffn, flops = PUBLISHED[name]
    config = paper(name)
    millions = counts.parameters(config) / 1e6
    assert 0 < millions - matrices(config) < 0.01 * millions
    if ffn is not None:
        assert millions == pytest.approx(total, abs=0.5)
        assert matrices(config, ".mlp.") == pytest.approx(ffn, abs=0.5)
    else:
        assert matrices(config) == pytest.approx(total, abs=0.06)
    if flops is not None:
        assert training_flops(config) == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions"), [("wide_lowrank_m", 219), ("wide_lowrank_l", 464), ("wide_blockdiag", 211)]
)
def test_the_wide_and_structured_models(name: str, millions: int) -> None:
    config = load(CONFIGS / f"{name}.json")
    assert counts.parameters(config) / 1e6 == pytest.approx(millions, abs=0.5)
    assert config.kv_heads * config.head_dim == 256
    size = "l" if name.endswith("_l") else "m"
    assert (config.train.steps, config.train.learning_rate) == MODELS[size][5:]
    assert build_schedule(config).guided_steps == round(config.train.steps / 2)


def test_wide_models_take_the_dense_models_training_flops_when_guided_less_often() -> None:
    wide, dense = load(CONFIGS / "wide_lowrank_m.json"), paper("m_dense")
    assert counts.flops_per_token(wide) < counts.flops_per_token(dense)
    assert counts.flops_per_token(wide) + counts.guide_flops_per_token(wide) > counts.flops_per_token(dense)


# r of fixed_flop at 32%, the authors' (stochastic) runs
SHARES = {"low_rank": (0.30, 0.38, 0.41, 0.43), "block_dense": (0.30, 0.40, 0.41, 0.45)}


@pytest.mark.parametrize("kind", SHARES)
def test_fixed_flop_guides_and_repeats_the_published_share_at_the_dense_models_flops(kind: str) -> None:
    for size, share in zip(MODELS, SHARES[kind], strict=True):
        file = CONFIGS / "paper" / f"{size}_{kind}_32.json"
        for coin in (True, False):
            config = load(file, ["guide.mode=fixed_flop", f"guide.stochastic={json.dumps(coin)}"])
            clock, steps = build_schedule(config), config.train.steps
            assert flops(config) == pytest.approx(training_flops(paper(f"{size}_dense")), rel=0.005)
            assert clock.total_steps == steps + clock.guided_steps
            if coin:
                assert equal_flops_fraction(config) == pytest.approx(share, abs=0.006)
            assert clock.guided_steps == round(equal_flops_fraction(config) * steps)
            own, guide = counts.flops_per_token(config), counts.guide_flops_per_token(config)
            by_step = sum(
                own + guide * clock.expected_drawn_fraction(step) for step in range(clock.total_steps)
            )
            assert by_step * config.tokens_per_step == pytest.approx(flops(config), rel=1e-9)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_counts_agree_with_one_another(path: Path) -> None:
    config = load(path)
    parts, guide = counts.parameters_by_part(config), counts.guide_parameters(config)
    for guided in (False, True):
        tensors = split_table.model_tensors(config, guide=guided)
        assert sum(parts.values()) + guided * guide == sum(math.prod(spec.shape) for spec in tensors.values())
    assert counts.parameters(config) == sum(parts.values())
    assert parts["embedding"] == config.model.vocab * config.model.width
    guided_layers = config.model.layers - len(config.ffn.dense_layers) if config.structured else 0
    assert guide == 2 * config.model.width * config.ffn_width * guided_layers
    assert counts.guide_flops_per_token(config) == 6 * guide
    if config.parallel.tensor == 1:
        assert counts.parameters_per_rank(config, guide=False) == sum(parts.values())
        assert counts.parameters_per_rank(config, guide=True) == sum(parts.values()) + guide
    attention = 12 * config.model.layers * config.attention_dim * config.model.sequence
    assert counts.flops_per_token(config) == round(6e6 * matrices(config)) + attention


def test_an_untied_embedding_is_counted_but_looked_up_for_nothing() -> None:
    file = CONFIGS / "paper" / "s_dense.json"
    tied, untied = load(file), load(file, ["model.tie_embeddings=false"])
    table = 32_000 * 768
    assert counts.parameters(untied) - counts.parameters(tied) == table
    assert counts.flops_per_token(untied) == counts.flops_per_token(tied)


@pytest.mark.parametrize(
    ("overrides", "guide"),
    [([], False), (["model.activation=swiglu"], False), ([], True), (["model.kv_heads=4"], False)],
    ids=["", "swiglu", "guided", "gqa"],
)
@pytest.mark.parametrize("kind", ["low_rank", "block_dense", "block_shuffle"])
def test_tensor_parallel_ranks_share_all_but_the_replicated(
    kind: str, overrides: list[str], guide: bool
) -> None:
    for p in (2, 4):
        config = load(CONFIGS / "paper" / f"s_{kind}_32.json", [f"parallel.tensor={p}", *overrides])
        specs = split_table.model_tensors(config, guide=guide).values()
        cut = sum(spec.numel for spec in specs if spec.cut)
        whole = sum(spec.numel for spec in specs if not spec.cut)
        assert cut % p == 0
        assert counts.parameters_per_rank(config, guide=guide) == cut // p + whole
        assert cut > whole


# ----------------------------------------------------------------------------------------------------- memory


def memory(data_parallel: int, precision: str = "bf16", guide: bool = False, **over: Any) -> dict[str, int]:
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in over.items()]
    return memory_per_rank(
        load(CONFIGS / "paper" / "s_low_rank_32.json", overrides), precision, data_parallel, guide=guide
    )


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_falls_with_the_stage_and_with_data_parallel_ranks(precision: str) -> None:
    def state(ranks: int, stage: int) -> int:
        held = memory(ranks, precision, zero__stage=stage)
        return held["weights"] + held["gradients"] + held["optimizer"]

    for ranks in (2, 4, 64):
        sizes = [state(ranks, stage) for stage in (1, 2, 3)]
        assert sizes == sorted(set(sizes), reverse=True)
    for stage in (1, 2, 3):
        totals = [memory(ranks, precision, zero__stage=stage)["total"] for ranks in (1, 2, 8, 64)]
        assert totals == sorted(set(totals), reverse=True)
    assert memory(1, precision, zero__stage=0) == memory(64, precision, zero__stage=0)


def test_each_stage_shares_what_it_says() -> None:
    held = {stage: memory(4, zero__stage=stage) for stage in (1, 2, 3)}
    n = counts.parameters(paper("s_low_rank_32"))
    assert [held[stage]["optimizer"] for stage in (1, 2, 3)] == [12 * n // 4] * 3
    assert held[2]["gradients"] * 4 == pytest.approx(held[1]["gradients"], abs=4)
    assert held[1]["weights"] == held[2]["weights"] == 2 * n == pytest.approx(4 * held[3]["weights"], abs=4)
    assert all(
        row["total"] == sum(size for part, size in row.items() if part != "total") for row in held.values()
    )


def test_memory_falls_with_tensor_parallelism_recomputation_and_micro_batches() -> None:
    assert memory(1, parallel__tensor=2)["weights"] < memory(1)["weights"]
    assert memory(1, recompute="full")["activations"] < memory(1)["activations"]
    assert memory(1, train__micro_batch_size=4)["activations"] * 2 == memory(1)["activations"]
    split, sequence = memory(1, parallel__tensor=2), memory(1, parallel__tensor=2, parallel__sequence="true")
    assert sequence["activations"] < split["activations"] < memory(1)["activations"]
    assert memory(1, guide=True)["optimizer"] > memory(1)["optimizer"]
