"""The model card: README.md of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sffn_dist.checkpoint.weights import Weights
from sffn_dist.conversion.hf import names
from sffn_dist.conversion.hf.describe import FFN, DType
from sffn_dist.spec import counts
from sffn_dist.spec.config import Config
from sffn_dist.spec.split_table import configured_structure

PAPER = "2406.16450"
TITLE = "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers"
PARTS = {
    "embedding": "embeddings",
    "attention": "attention",
    "ffn_dense": "feed-forward, dense",
    "ffn_structured": "feed-forward, structured",
    "norms": "norms",
}
LOADING = {
    "merged": "Plain `transformers` loads it; feed-forward layers that were structured are multiplied out "
    "to dense matrices.",
    "structured": "The feed-forward layers are kept as factors. Loading runs `modeling_sffn.py` of this "
    "folder, which applies them; it needs transformers 4.48 or newer.",
}


def card(name: str, weights: Weights, source: Config, ffn: FFN, dtype: DType) -> str:
    """The text of the card of the exported ``weights``, which were made from a model of config ``source``."""
    config, step = weights.config, weights.step
    counted = counts.parameters_by_part(config)
    parts = [(label, f"{counted[part]:,}") for part, label in PARTS.items() if counted[part]]
    parts.append(("all", f"{counts.parameters(config):,}"))
    if weights.guide:
        parts.append(("guides, besides", f"{counts.guide_parameters(config):,}"))
    steps = f" {step:,} steps of training lie behind these weights." if step else ""
    cited = f"[arXiv {PAPER}](https://arxiv.org/abs/{PAPER})"
    kind = (
        f" Its feed-forward layers are structured: `{source.ffn.kind}` of {cited}."
        if source.structured
        else ""
    )
    sections = [
        _header(source, weights.facts),
        f"# {_plain(name)}",
        f"A GPT-style language model of {counts.parameters(config):,} parameters.{kind}{steps}",
        f"## Loading\n\n{LOADING[ffn]}{_ranks(config, ffn)}{_padding(config)}\n\n"
        f"```python\n{_snippet(name, weights, ffn)}\n```",
        "## Model\n\n" + _table(("setting", "value"), _settings(config, source, dtype)),
        "## Parameters\n\n" + _table(("part", "parameters"), parts),
        "## Provenance\n\n" + _table(("", ""), [("weights of", weights.origin), *_facts(weights.facts)]),
        f"Made with sffn_dist, after *{TITLE}*, {cited}.",
    ]
    return "\n\n".join(sections) + "\n"


def _ranks(config: Config, ffn: FFN) -> str:
    """What tensor-parallel ranks of transformers hold of a structured export."""
    if ffn != "structured" or not config.structured:
        return ""
    if names.cut_over_ranks(config):
        return (
            ' With `tp_plan="auto"` attention and the factors at the inner features are cut over ranks; '
            "the other factors are whole on every rank."
        )
    return (
        ' With `tp_plan="auto"` attention is cut over ranks; the structured feed-forward layers are whole '
        "on every rank."
    )


def _padding(config: Config) -> str:
    """What rows of no token mean for who reads the logits."""
    first, rows = config.vocab_unpadded, config.model.vocab
    if first == rows:
        return ""
    return (
        f" Rows {first:,} to {rows - 1:,} of the vocabulary stand for no token. `generate` never samples "
        f"them (`suppress_tokens` in generation_config.json); logits that you read yourself hold them: cut "
        f"those at {first:,}."
    )


def _snippet(name: str, weights: Weights, ffn: FFN) -> str:
    """Python that loads the folder from beside it, and generates where there is a tokenizer.

    The tokenizer reads config.json too, which names the folder's code: it asks at the terminal unless told.
    """
    folder = json.dumps(name)
    remote = ", trust_remote_code=True" if ffn == "structured" else ""
    if weights.tokenizer is None:
        return (
            "from transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder}{remote})"
        )
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({folder}{remote})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder}{remote})\n"
        'inputs = tokenizer("a", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4)[0]))"
    )


def _header(source: Config, facts: Mapping[str, Any]) -> str:
    """YAML; JSON's scalars and lists are YAML's. The licence is left out unless it is known."""
    structure = ["structured-feed-forward", source.ffn.kind.replace("_", "-")] if source.structured else []
    tags = ["text-generation", *structure, f"arxiv:{PAPER}"]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}"]
    if isinstance(facts.get("license"), str):
        lines.insert(0, f"license: {json.dumps(facts['license'])}")
    return "\n".join(["---", *lines, "---"])


def _settings(config: Config, source: Config, dtype: DType) -> Iterable[tuple[str, Any]]:
    model, ffn = config.model, source.ffn
    yield from (("layers", model.layers), ("width", model.width), ("feed-forward width", config.ffn_width))
    yield from (("heads", model.heads), ("key/value heads", config.kv_heads), ("head size", config.head_dim))
    yield from (("context, tokens", model.sequence), ("vocabulary", model.vocab), ("norm", model.norm))
    yield from (
        ("activation", model.activation),
        ("bias", model.bias),
        ("tied embeddings", model.tie_embeddings),
    )
    yield from (
        ("rotary base", model.rope_base),
        ("numbers", dtype),
        ("feed-forward structure, as trained", ffn.kind),
    )
    structure = configured_structure(source, ffn.kind)
    yield from ((name, getattr(structure, name)) for name in structure.settings)
    if not structure.dense:
        yield "layers left dense", ", ".join(map(str, ffn.dense_layers)) or "none"


def _facts(facts: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _table(head: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {_plain(key)} | {_plain(value)} |" for key, value in rows])


def _plain(value: Any) -> str:
    """A value as one line of a table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|")
