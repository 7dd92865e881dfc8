"""Readings of config.json that many families share: old spellings and new, and their defaults."""

import math
from typing import Any

from model.config import Activation, Rope

Json = dict[str, Any]


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that no entry of the table describes."""


ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def refuse(h: Json, **wanted: object) -> None:
    """An option that changes the network and that nobody has taught us is an error, not a guess."""
    for key, value in wanted.items():
        if key in h and h[key] is not None and h[key] != value:
            raise UnsupportedModelError(
                f"{key}={h[key]!r} is not supported for {h.get('model_type')}; only {value!r} is"
            )


def common(h: Json) -> dict[str, Any]:
    """What nearly every config calls by the same names."""
    heads = h.get("num_attention_heads") or h.get("n_head") or h.get("num_heads")
    heads = heads or h["attention_heads"]
    hidden = h.get("hidden_size") or h.get("n_embd") or h["d_model"]
    eos = h.get("eos_token_id")
    return {
        "vocabulary": h["vocab_size"],
        "hidden": hidden,
        "layers": h.get("num_hidden_layers") or h.get("n_layer") or h["num_layers"],
        "heads": heads,
        "kv_heads": h.get("num_key_value_heads") or heads,
        "head_dim": h.get("head_dim") or hidden // heads,
        "feed_forward": h.get("intermediate_size") or h.get("n_inner") or 4 * hidden,
        "context": h.get("max_position_embeddings") or h.get("n_positions") or 2048,
        "tied": h.get("tie_word_embeddings", False),
        "eos": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "bos": h.get("bos_token_id"),
    }


def rope(h: Json, kind: str = "", dim: int = 0, **given: Any) -> Rope:
    """One rotation, from `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    base = common(h)
    p: dict[str, Any] = dict(h.get("rope_parameters") or h.get("rope_scaling") or {})
    p = p.get(kind, p)
    scaling = p.get("rope_type") or p.get("type") or "default"
    partial_factor = p.get("partial_rotary_factor", h.get("partial_rotary_factor") or 1.0)
    theta = p.get("rope_theta") or h.get("rope_theta") or given.get("theta") or 10_000.0
    made: dict[str, Any] = given | {
        "theta": float(theta),
        "dim": dim or int(base["head_dim"] * partial_factor),
    }
    if scaling == "default":
        return Rope(**made)
    if scaling == "su":  # what longrope was called first
        scaling = "longrope"
    trained = p.get("original_max_position_embeddings") or h.get("original_max_position_embeddings")
    context = base["context"]
    factor = float(p.get("factor") or context / (trained or context))
    made |= {"scaling": scaling, "factor": factor, "trained_context": trained or context}
    match scaling:
        case "linear":
            pass
        case "dynamic":  # stretches beyond the config's own context, whatever came before
            made["trained_context"] = context
        case "llama3":
            made |= {
                "low_frequency": p["low_freq_factor"],
                "high_frequency": p["high_freq_factor"],
            }
        case "yarn":
            made |= {
                "beta_fast": p.get("beta_fast") or 32.0,
                "beta_slow": p.get("beta_slow") or 1.0,
                "truncate": p.get("truncate", True),
                "attention_factor": _yarn_factor(p, factor),
            }
        case "longrope":
            reach = max(math.log(factor) / math.log(made["trained_context"]), 0)
            made |= {
                "short_factors": tuple(p["short_factor"]),
                "long_factors": tuple(p["long_factor"]),
                "attention_factor": p.get("attention_factor") or math.sqrt(1 + reach),
            }
        case _:
            raise UnsupportedModelError(
                f"rope scaling {scaling!r} is not supported; known are default, linear, dynamic, "
                "llama3, yarn and longrope"
            )
    return Rope(**made)


def _yarn_factor(p: Json, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def sliding(h: Json, kinds: list[str] | None) -> tuple[int, ...]:
    """A window for each layer, from the list of kinds (or one for all)."""
    window, layers = h.get("sliding_window") or 0, common(h)["layers"]
    kinds = h.get("layer_types") or kinds or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def llama(h: Json, **more: Any) -> dict[str, Any]:
    """RMS norms, rotary positions, a gated MLP: most families differ from this in a few words."""
    return {
        "activation": activation(h.get("hidden_act") or h.get("hidden_activation") or "silu"),
        "norm_eps": h.get("rms_norm_eps", 1e-6),
        "ropes": (rope(h),) * common(h)["layers"],
        "qkv_bias": h.get("attention_bias", False),
        "out_bias": h.get("attention_bias", False),
        "mlp_bias": h.get("mlp_bias", False),
        **more,
    }


def classic(h: Json, **more: Any) -> dict[str, Any]:
    """Layer norms and a plain MLP, all with biases: what came before."""
    act = h.get("activation_function") or h.get("hidden_act") or "gelu_new"
    return {
        "activation": activation(act),
        "gated": False,
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": h.get("layer_norm_epsilon") or h.get("layer_norm_eps") or 1e-5,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        **more,
    }


def qwen_windows(h: Json) -> tuple[int, ...]:
    """Only layers from max_window_layers on slide, and only when asked."""
    if not h.get("use_sliding_window"):
        return ()
    first, layers = h.get("max_window_layers", 28), common(h)["layers"]
    return sliding(h, ["full" if i < first else "sliding_attention" for i in range(layers)])
