"""The split table: what tensors a config means, and how each is cut over ranks. Standard library only.

The split table (:func:`linear_tensors`, :func:`model_tensors`) is the one declaration of every tensor's full
shape and of how it is cut over p tensor-parallel ranks. Constructors, initialisation, checkpoints, the plan
and the tests read it. What is a structure's own, its factors' shapes and cuts, stands in
structured/<kind>.py.

Shapes: h width, f inner width, p tensor-parallel ranks; matrices are (outputs, inputs).
"""

from __future__ import annotations

from sffn_dist.spec.config import Config
from sffn_dist.structured.cut import Cut, Role, TensorSpec
from sffn_dist.structured.registry import structure_class
from sffn_dist.structured.structure import Structure, inner_features


def linear_tensors(
    structure: Structure,
    role: Role,
    inputs: int,
    outputs: int,
    *,
    gated: bool = False,
    bias: bool = False,
    guide: bool = False,
) -> dict[str, TensorSpec]:
    """The split table of one linear of a feed-forward layer.

    ``role`` "column" is the first linear (h -> f, or 2f when ``gated``), "row" the second (f -> h). Factors
    come first-applied first; then ``guide`` (outputs, inputs) and ``bias`` (outputs,).
    """
    gate = (2,) if role == "column" and gated else ()
    shapes = structure.factor_shapes(inputs, outputs)
    wide, cut = structure.wide_factor(role, inputs, outputs, gate)
    tensors = {
        name: TensorSpec(shapes[name], cut if name == wide else None) for name in structure.factor_order(role)
    }
    if guide and not structure.dense:
        tensors["guide"] = TensorSpec((outputs, inputs), structure.dense_cut(role, inputs, outputs, gate))
    if bias:
        layout = structure.layout(inner_features(role, inputs, outputs, gate))
        tensors["bias"] = TensorSpec((outputs,), layout.within(gate) if role == "column" else None)
    return tensors


def wide_factor(specs: dict[str, TensorSpec]) -> TensorSpec:
    """Of a structured linear's tensors, the factor that touches the f axis: the cut one.

    Its groups of blocks are z's chunks.
    """
    return next(
        spec for name, spec in specs.items() if name not in ("guide", "bias") and spec.cut is not None
    )


# -------------------------------------------------------------------------------------------- the whole model


def ffn_structure(config: Config, layer: int) -> Structure:
    """The structure of a layer's two feed-forward linears."""
    return configured_structure(config, config.kind_of_layer(layer))


def configured_structure(config: Config, kind: str) -> Structure:
    """A structure of this kind with the config's settings, as far as it has them."""
    cls = structure_class(kind)
    return cls(**{name: getattr(config.ffn, name) for name in cls.settings})


def ffn_linears(config: Config) -> tuple[tuple[str, Role, int, int], ...]:
    """(name, role, inputs, outputs) of a feed-forward layer's two linears.

    The first one's outputs are 2f if gated.
    """
    h, f = config.model.width, config.ffn_width
    return ("linear_fc1", "column", h, 2 * f if config.gated else f), ("linear_fc2", "row", f, h)


def layer_tensors(config: Config, layer: int, *, guide: bool) -> dict[str, TensorSpec]:
    """Tensors of one transformer layer by their names inside it (megatron-core's names), with its guides
    or without.
    """
    model, h = config.model, config.model.width
    qkv = config.attention_dim + 2 * config.kv_heads * config.head_dim
    norm = _norm(config)
    tensors: dict[str, TensorSpec] = {f"input_layernorm.{k}": v for k, v in norm.items()}
    # rows of linear_qkv come grouped by key/value head: its query heads, its key, its value
    tensors["self_attention.linear_qkv.weight"] = TensorSpec((qkv, h), Cut((qkv, h), (0,)))
    tensors["self_attention.linear_proj.weight"] = TensorSpec(
        (h, config.attention_dim), Cut((h, config.attention_dim), (1,))
    )
    if model.bias:
        tensors["self_attention.linear_qkv.bias"] = TensorSpec((qkv,), Cut((qkv,), (0,)))
        tensors["self_attention.linear_proj.bias"] = TensorSpec((h,))
    tensors.update({f"pre_mlp_layernorm.{k}": v for k, v in norm.items()})
    structure = ffn_structure(config, layer)
    for linear, role, inputs, outputs in ffn_linears(config):
        specs = linear_tensors(
            structure, role, inputs, outputs, gated=config.gated, bias=model.bias, guide=guide
        )
        tensors.update({f"mlp.{linear}.{name}": spec for name, spec in specs.items()})
    return tensors


def _norm(config: Config) -> dict[str, TensorSpec]:
    names = ("weight", "bias") if config.model.norm == "layernorm" else ("weight",)
    return {name: TensorSpec((config.model.width,)) for name in names}


def model_tensors(config: Config, *, guide: bool) -> dict[str, TensorSpec]:
    """Every parameter of the model: name in the GPTModel -> spec. A tied output layer is not listed.

    ``guide``: with a guide for every structured linear, as in the guided phase, or with none, as in the
    others.
    """
    table = (config.model.vocab, config.model.width)
    tensors = {"embedding.word_embeddings.weight": TensorSpec(table, Cut(table, (0,)))}
    for layer in range(config.model.layers):
        tensors.update(
            {
                f"decoder.layers.{layer}.{name}": spec
                for name, spec in layer_tensors(config, layer, guide=guide).items()
            }
        )
    tensors.update({f"decoder.final_layernorm.{name}": spec for name, spec in _norm(config).items()})
    if not config.model.tie_embeddings:
        tensors["output_layer.weight"] = TensorSpec(table, Cut(table, (0,)))
    return tensors


def is_guide(name: str) -> bool:
    return name.endswith(".guide")
