"""The paper authors' architecture in plain torch, on their own names; written from what their code
computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

H, A, INNER, HEADS, KV, LAYERS, VOCAB, LENGTH = 32, 48, 80, 6, 2, 3, 50, 24
D = A // HEADS
METHODS = {
    "linear": {},
    "lowrank": {"rank": 12},
    "blockdense": {"rank": 12, "nblocks": 4},
    "blockshuffle": {"nblocks": 4},
}


def configured(method: str, act: str, norm: str, *, bias: bool, guided: bool | None) -> dict[str, Any]:
    """Their settings; ``guided``: None without a guide, else whether its steps go on."""
    model = {
        "hidden_dim": H, "attn_dim": A, "ffn_dim": INNER, "num_q_heads": HEADS, "num_kv_heads": KV,
        "num_layers": LAYERS, "max_position_embeddings": LENGTH, "vocab_size": VOCAB,
        "tie_word_embeddings": bias, "ln": norm, "act": act, "bias": bias,
        "scale_attn_by_inverse_layer_idx": False,
        "pos_emb": {"name": "rope", "rotary_interleaved": False, "seq_len_interpolation_factor": None,
                    "rotary_base": 500},
    }  # fmt: skip
    tree: dict[str, Any] = {
        "model": {"name": "gpt2", "kwargs": model},
        "method": {"name": method},
        "data": {"train": {"train_batch": 64}, "block_size": "${model.kwargs.max_position_embeddings}"},
        "optimization": {
            "global_batch_size": 512, "seed": 1005, "gradient_clipping": 1.0,
            "optimizer": {"kwargs": {"lr": 6e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}},
            "lr_scheduler": {"kwargs": {"T_max": 100, "warmup_iter": 0.1, "eta_min": "${eval:0.1}"}},
        },
    }  # fmt: skip
    if method != "linear":
        training: dict[str, Any] = {"enabled": bool(guided)}
        if guided is not None:
            training |= {"scheduler": "linear", "max_step": 40, "reduce_flop": True}
        tree["method"]["kwargs"] = {**METHODS[method], "first_layer": True, "training": training}
    return tree


def factors(method: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    sizes = METHODS[method]
    if method == "linear":
        return {"weight": (outputs, inputs)}
    if method == "lowrank":
        return {"lr1": (sizes["rank"], inputs), "lr2": (outputs, sizes["rank"])}
    blocks = sizes["nblocks"]
    if method == "blockdense":
        return {
            "blkdiag": (blocks, sizes["rank"] // blocks, inputs // blocks),
            "lr": (outputs, sizes["rank"]),
        }
    narrow = min(inputs, outputs) // blocks
    return {"blkdiag1": (blocks, narrow, inputs // blocks), "blkdiag2": (blocks, outputs // blocks, narrow)}


def state_dict(config: Mapping[str, Any], ratio: float | None) -> dict[str, Tensor]:
    """Random parameters by their names, in the shapes that their modules have."""
    model, method = config["model"]["kwargs"], config["method"]["name"]
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 9)

    state: dict[str, Tensor] = {"model.wte.weight": draw(VOCAB, H)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (("qkv_linear", (HEADS + 2 * KV) * D, H), ("o_linear", H, A)):
            state[f"{prefix}{name}.weight"] = draw(rows, columns)
            if model["bias"]:
                state[f"{prefix}{name}.bias"] = draw(rows)
        for norm in ("ln1", "ln2"):
            state[f"{prefix}{norm}.weight"] = 1 + draw(H)
            if model["ln"] == "layernorm":
                state[f"{prefix}{norm}.bias"] = draw(H)
        for name, inputs, outputs in (
            ("fc1", H, INNER * (2 if model["act"] == "swiglu" else 1)),
            ("fc2", INNER, H),
        ):
            own = "linear" if layer == 0 else method
            if model["bias"]:
                state[f"{prefix}mlp.{name}.bias"] = draw(outputs)
            if ratio is not None and own != "linear":
                state[f"{prefix}mlp.{name}.guide_linear"] = draw(outputs, inputs)
                state[f"{prefix}mlp.{name}.count"], state[f"{prefix}mlp.{name}.ratio"] = (
                    torch.tensor(13),
                    torch.tensor(ratio),
                )
            state.update(
                {
                    f"{prefix}mlp.{name}.{leaf}": draw(*shape)
                    for leaf, shape in factors(own, inputs, outputs).items()
                }
            )
    state["model.ln_f.weight"] = 1 + draw(H)
    if model["ln"] == "layernorm":
        state["model.ln_f.bias"] = draw(H)
    state["lm_head.weight"] = state["model.wte.weight"] if model["tie_word_embeddings"] else draw(VOCAB, H)
    return state


# ---------------------------------------------------------------------------------------------- the reference


def reference(state: Mapping[str, Tensor], config: Mapping[str, Any], tokens: Tensor, alpha: float) -> Tensor:
    """Logits (batch, S, vocab) of their architecture, in evaluation."""
    model = config["model"]["kwargs"]
    x = state["model.wte.weight"][tokens]
    for layer in range(LAYERS):
        part = {
            k.removeprefix(f"model.layers.{layer}."): v
            for k, v in state.items()
            if k.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(part, _norm(part, "ln1", model["ln"], x), model["pos_emb"]["rotary_base"])
        inner = _linear(part, "mlp.fc1.", _norm(part, "ln2", model["ln"], x), alpha)
        if model["act"] == "gelu":
            inner = inner * 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        else:
            gate, up = inner.split(INNER, dim=-1)
            inner = gate * torch.sigmoid(gate) * up
        x = x + _linear(part, "mlp.fc2.", inner, alpha)
    return _norm(state, "model.ln_f", model["ln"], x) @ state["lm_head.weight"].T


def _norm(part: Mapping[str, Tensor], name: str, kind: str, x: Tensor) -> Tensor:
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    return x * part[f"{name}.weight"] + part.get(f"{name}.bias", torch.zeros(()))


def _attention(part: Mapping[str, Tensor], x: Tensor, base: float) -> Tensor:
    batch, length, _ = x.shape
    qkv = x @ part["qkv_linear.weight"].T + part.get("qkv_linear.bias", torch.zeros(()))
    q, k, v = qkv[..., :A], qkv[..., A : A + KV * D], qkv[..., A + KV * D :]
    q, k, v = (t.reshape(batch, length, -1, D).transpose(1, 2) for t in (q, k, v))
    angles = torch.arange(length)[:, None] * base ** (-torch.arange(0, D, 2) / D)
    cos, sin = angles.cos(), angles.sin()

    def turn(t: Tensor) -> Tensor:  # the pair (i, i + D/2) by angle i
        a, b = t[..., : D // 2], t[..., D // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    out = []
    for head in range(HEADS):
        group = head // (HEADS // KV)
        scores = turn(q)[:, head] @ turn(k)[:, group].transpose(1, 2) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v[:, group])
    return torch.cat(out, -1) @ part["o_linear.weight"].T + part.get("o_linear.bias", torch.zeros(()))


def _linear(part: Mapping[str, Tensor], prefix: str, x: Tensor, alpha: float) -> Tensor:
    p = {key.removeprefix(prefix): value for key, value in part.items() if key.startswith(prefix)}
    if "weight" in p:
        y = x @ p["weight"].T
    elif "lr1" in p:
        y = x @ p["lr1"].T @ p["lr2"].T
    elif "blkdiag" in p:
        y = x @ torch.block_diag(*p["blkdiag"]).T @ p["lr"].T
    else:
        z = x @ torch.block_diag(*p["blkdiag1"]).T  # (k, q) flat; read as (r, l)
        blocks = p["blkdiag2"].shape[0]
        dealt = (
            z.unflatten(-1, (-1, blocks)).transpose(-1, -2).flatten(-2) @ torch.block_diag(*p["blkdiag2"]).T
        )
        y = dealt.unflatten(-1, (blocks, -1)).transpose(-1, -2).flatten(-2)
    if alpha and "guide_linear" in p:
        y = alpha * (x @ p["guide_linear"].T) + (1 - alpha) * y
    return y + p.get("bias", torch.zeros(()))
