"""The table of families: what a checkpoint's config.json and tensor names mean here.

An architecture's own reading of its config, if it is not everybody's, then its tensor names, then
one entry. `family.py` says how names are written, `readings.py` what many configs have in common.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from model.config import Experts, Rope
from model.family import Family, Json
from model.readings import (
    UnsupportedModelError,
    activation,
    classic,
    common,
    llama,
    qwen_windows,
    refuse,
    rope,
    sliding,
)

# ── configs that are read in their own way ────────────────────────────────────────────────────


def gemma(h: Json, **more: Any) -> dict[str, Any]:
    h = {"head_dim": 256, **h}
    act = h.get("hidden_activation") or "gelu_pytorch_tanh"
    return llama(
        h,
        activation=activation(act),
        head_dim=h["head_dim"],
        tied=h.get("tie_word_embeddings", True),
        embed_scale=math.sqrt(common(h)["hidden"]),
        **more,
    )


def gemma2(h: Json, pattern: int, **more: Any) -> dict[str, Any]:
    """Every `pattern`-th layer sees everything, the others a window."""
    every = range(1, common(h)["layers"] + 1)
    kinds = ["full" if i % pattern == 0 else "sliding_attention" for i in every]
    return gemma(
        h,
        norms="both",
        attention_scale=float(h.get("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=h.get("attn_logit_softcapping") or 0.0,
        logit_softcap=h.get("final_logit_softcapping") or 0.0,
        windows=sliding(h, kinds),
        **more,
    )


def gemma3(h: Json) -> dict[str, Any]:
    """A short rotation inside windows, a long one (scaled, in larger models) elsewhere."""
    pattern = h.get("sliding_window_pattern") or h.get("_sliding_window_pattern") or 6
    made = gemma2(h, pattern, qk_norm="head")
    if "rope_parameters" in h:
        wide, near = rope(h, "full_attention"), rope(h, "sliding_attention")
    else:
        wide = rope(h, theta=1_000_000.0)
        near = Rope(theta=h.get("rope_local_base_freq", 10_000.0), dim=wide.dim)
    ropes = tuple(near if window else wide for window in made["windows"])
    return made | {"ropes": ropes}


def falcon(h: Json) -> dict[str, Any]:
    """Two architectures in one name: the new one groups its heads and may norm twice."""
    heads, fresh = common(h)["heads"], h.get("new_decoder_architecture", False)
    parallel = fresh or h.get("parallel_attn", True)
    old_kv = 1 if h.get("multi_query", True) else heads
    twice = fresh and (h.get("num_ln_in_parallel_attn") or 2) == 2
    head_dim = common(h)["hidden"] // heads
    alibi = h.get("alibi", False)
    return classic(
        h,
        activation=activation(h.get("activation", "gelu")),
        kv_heads=h.get("num_kv_heads") or heads if fresh else old_kv,
        feed_forward=h.get("ffn_hidden_size") or 4 * common(h)["hidden"],
        tied=h.get("tie_word_embeddings", True),
        parallel=parallel,
        shared_norm=parallel and not twice,
        ropes=() if alibi else (rope(h),) * common(h)["layers"],
        positions="alibi" if alibi else "none",
        alibi_scale=head_dim**-0.5,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), h.get("bias", False)),
    )


def opt(h: Json) -> dict[str, Any]:
    refuse(h, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    width, before = h.get("word_embed_proj_dim", h["hidden_size"]), h["do_layer_norm_before"]
    return classic(
        h,
        activation=activation(h.get("activation_function", "relu")),
        feed_forward=h["ffn_dim"],
        tied=h.get("tie_word_embeddings", True),
        positions="learned",
        position_offset=2,
        norms="pre" if before else "post",
        final_norm=before,
        embed_dim=width if width != h["hidden_size"] else 0,
    )


def qwen3_moe(h: Json) -> dict[str, Any]:
    step, plain = h.get("decoder_sparse_step", 1), h.get("mlp_only_layers") or []
    count = h.get("num_experts") or h["num_local_experts"]
    layers = range(common(h)["layers"])
    return llama(
        h,
        out_bias=h.get("attention_bias", False),
        qk_norm="head",
        windows=qwen_windows(h),
        expert_layers=tuple(i not in plain and (i + 1) % step == 0 for i in layers),
        experts=Experts(
            count=count,
            per_token=h["num_experts_per_tok"],
            feed_forward=h["moe_intermediate_size"],
            renormalise=h.get("norm_topk_prob", False),
        ),
    )


def gpt_neo(h: Json) -> dict[str, Any]:
    """GPT-3's layers, alternating between everything and a band; q·k is not scaled."""
    kinds = [kind for group, times in h["attention_types"] for kind in group * times]
    return classic(
        h,
        tied=h.get("tie_word_embeddings", True),
        positions="learned",
        qkv_bias=False,
        attention_scale=1.0,
        windows=tuple(h["window_size"] if kind == "local" else 0 for kind in kinds),
    )


def _xglm(h: Json) -> dict[str, Any]:
    return classic(
        h,
        activation=activation(h.get("activation_function", "gelu")),
        feed_forward=h["ffn_dim"],
        tied=h.get("tie_word_embeddings", True),
        positions="sinusoidal",
        position_offset=2,
        embed_scale=math.sqrt(h["d_model"]) if h.get("scale_embedding", True) else 1.0,
    )


def _phi(h: Json) -> dict[str, Any]:
    normed: dict[str, Any] = {"qk_norm": "head", "qk_norm_kind": "layer", "qk_norm_bias": True}
    return classic(
        h,
        parallel=True,
        shared_norm=True,
        ropes=(rope(h | {"partial_rotary_factor": h.get("partial_rotary_factor", 0.5)}),)
        * common(h)["layers"],
        head_bias=True,
        **(normed if h.get("qk_layernorm") else {}),
    )


def _stablelm(h: Json) -> dict[str, Any]:
    parallel = h.get("use_parallel_residual", False)
    partly = h | {"partial_rotary_factor": h.get("partial_rotary_factor", 0.25)}
    return llama(
        h,
        norm="layer",
        norm_bias=True,
        norm_eps=h.get("layer_norm_eps", 1e-5),
        ropes=(rope(partly),) * common(h)["layers"],
        qkv_bias=h.get("use_qkv_bias", False),
        parallel=parallel,
        shared_norm=parallel,
        qk_norm="heads" if h.get("qk_layernorm") else "none",
        qk_norm_kind="layer",
    )


def _gptj(h: Json) -> dict[str, Any]:
    turning = rope(h, dim=h.get("rotary_dim") or common(h)["head_dim"], interleaved=True)
    return classic(
        h,
        parallel=True,
        shared_norm=True,
        ropes=(turning,) * common(h)["layers"],
        qkv_bias=False,
        out_bias=False,
        head_bias=True,
    )


def _gpt2(h: Json) -> dict[str, Any]:
    refuse(h, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    refuse(h, add_cross_attention=False)
    return classic(h, tied=h.get("tie_word_embeddings", True), positions="learned")


def _bloom(h: Json) -> dict[str, Any]:
    refuse(h, apply_residual_connection_post_layernorm=False)
    return classic(
        h,
        context=h.get("seq_length", 2048),
        activation="gelu_tanh",
        tied=h.get("tie_word_embeddings", True),
        embed_norm=True,
        positions="alibi",
    )


def _gpt_neox(h: Json) -> dict[str, Any]:
    partly = h | {"partial_rotary_factor": h.get("rotary_pct", 0.25)}
    turning = rope(partly, theta=h.get("rotary_emb_base", 10_000.0))
    biased = h.get("attention_bias", True)
    return classic(
        h,
        parallel=h.get("use_parallel_residual", True),
        ropes=(turning,) * common(h)["layers"],
        qkv_bias=biased,
        out_bias=biased,
    )


def _mixtral(h: Json) -> dict[str, Any]:
    count, each = h["num_local_experts"], h["num_experts_per_tok"]
    inner = Experts(count=count, per_token=each, feed_forward=h["intermediate_size"])
    return llama(h, windows=sliding(h, None), experts=inner)


def _cohere(h: Json) -> dict[str, Any]:
    turning = rope(h, interleaved=True)
    return llama(
        h,
        norm="layer",
        norm_eps=h.get("layer_norm_eps", 1e-5),
        tied=h.get("tie_word_embeddings", True),
        parallel=True,
        shared_norm=True,
        ropes=(turning,) * common(h)["layers"],
        logit_scale=h.get("logit_scale", 0.0625),
        qk_norm="heads" if h.get("use_qk_norm") else "none",
        qk_norm_kind="layer",
    )


def _granite(h: Json) -> dict[str, Any]:
    return llama(
        h,
        embed_scale=h.get("embedding_multiplier", 1.0),
        residual_scale=h.get("residual_multiplier", 1.0),
        attention_scale=h.get("attention_multiplier", 1.0),
        logit_scale=1 / h.get("logits_scaling", 1.0),
    )


def _glm4(h: Json) -> dict[str, Any]:
    partly = h | {"partial_rotary_factor": h.get("partial_rotary_factor", 0.5)}
    return llama(
        h,
        norms="both",
        out_bias=False,
        ropes=(rope(partly, interleaved=True),) * common(h)["layers"],
    )


def _smollm3(h: Json) -> dict[str, Any]:
    layers, every = common(h)["layers"], h.get("no_rope_layer_interval", 4)
    turns = h.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
    ropes = tuple(rope(h) if turn else None for turn in turns)
    windows = sliding(h, None) if h.get("use_sliding_window") else ()
    return llama(h, tied=h.get("tie_word_embeddings", True), ropes=ropes, windows=windows)


def _starcoder2(h: Json) -> dict[str, Any]:
    biased = h.get("use_bias", True)
    return classic(
        h,
        tied=h.get("tie_word_embeddings", True),
        norm_eps=h.get("norm_epsilon", 1e-5),
        ropes=(rope(h),) * common(h)["layers"],
        windows=sliding(h, None),
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), biased),
    )


def _gpt_oss(h: Json) -> dict[str, Any]:
    kinds = ["full" if i % 2 else "sliding_attention" for i in range(common(h)["layers"])]
    return llama(
        h,
        activation="swigluoai",
        activation_limit=h.get("swiglu_limit", 7.0),
        qkv_bias=h.get("attention_bias", True),
        out_bias=h.get("attention_bias", True),
        windows=sliding(h, kinds),
        sinks=True,
        experts=Experts(
            count=h["num_local_experts"],
            per_token=h.get("num_experts_per_tok") or h["experts_per_token"],
            feed_forward=h["intermediate_size"],
            softmax_first=False,
            router_bias=True,
            bias=True,
        ),
    )


def _qwen3(h: Json) -> dict[str, Any]:
    h = {"head_dim": 128, **h}
    return llama(h, head_dim=h["head_dim"], qk_norm="head", windows=qwen_windows(h))


def _qwen2_moe(h: Json) -> dict[str, Any]:
    """An expert that every token visits, as loud as a gate of its own says."""
    made = qwen3_moe(h)
    shared = {"shared_feed_forward": h["shared_expert_intermediate_size"], "shared_gate": True}
    kind = replace(made["experts"], **shared)
    return made | {"experts": kind, "qk_norm": "none", "qkv_bias": h.get("qkv_bias", True)}


# ── tensor names that many families share ─────────────────────────────────────────────────────

L = "model.layers.{i}."
LLAMA = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.*": "norm.*",
    "lm_head.*": "head.*",
    L + "self_attn.q_proj.*": "layers.{i}.attention.qkv.* q",
    L + "self_attn.k_proj.*": "layers.{i}.attention.qkv.* k",
    L + "self_attn.v_proj.*": "layers.{i}.attention.qkv.* v",
    L + "self_attn.o_proj.*": "layers.{i}.attention.out.*",
    L + "mlp.gate_proj.*": "layers.{i}.mlp.up.* gate",
    L + "mlp.up_proj.*": "layers.{i}.mlp.up.* up",
    L + "mlp.down_proj.*": "layers.{i}.mlp.down.*",
    L + "input_layernorm.*": "layers.{i}.attention_norm.*",
    L + "post_attention_layernorm.*": "layers.{i}.mlp_norm.*",
}
QK_NORM = {
    L + "self_attn.q_norm.weight": "layers.{i}.attention.q_norm.weight",
    L + "self_attn.k_norm.weight": "layers.{i}.attention.k_norm.weight",
}
FUSED = {
    L + "self_attn.qkv_proj.*": "layers.{i}.attention.qkv.*",
    L + "mlp.gate_up_proj.*": "layers.{i}.mlp.up.*",
}
OLMO2 = QK_NORM | {
    L + "post_attention_layernorm.*": "layers.{i}.attention_out_norm.*",
    L + "post_feedforward_layernorm.*": "layers.{i}.mlp_out_norm.*",
}
GEMMA2 = LLAMA | OLMO2 | {L + "pre_feedforward_layernorm.weight": "layers.{i}.mlp_norm.weight"}
T = "transformer.h.{i}."
BLOOM = {
    "transformer.word_embeddings.weight": "embed.weight",
    "transformer.word_embeddings_layernorm.*": "embed_norm.*",
    "transformer.ln_f.*": "norm.*",
    "lm_head.weight": "head.weight",
    T + "input_layernorm.*": "layers.{i}.attention_norm.*",
    T + "ln_attn.*": "layers.{i}.attention_norm.*",
    T + "ln_mlp.*": "layers.{i}.mlp_norm.*",
    T + "post_attention_layernorm.*": "layers.{i}.mlp_norm.*",
    T + "self_attention.query_key_value.*": "layers.{i}.attention.qkv.* heads-apart",
    T + "self_attention.dense.*": "layers.{i}.attention.out.*",
    T + "mlp.dense_h_to_4h.*": "layers.{i}.mlp.up.*",
    T + "mlp.dense_4h_to_h.*": "layers.{i}.mlp.down.*",
}
GPT2 = {
    "wte.weight": "embed.weight",
    "wpe.weight": "positions.weight",
    "ln_f.*": "norm.*",
    "h.{i}.ln_1.*": "layers.{i}.attention_norm.*",
    "h.{i}.ln_2.*": "layers.{i}.mlp_norm.*",
    "h.{i}.attn.c_attn.weight": "layers.{i}.attention.qkv.weight transposed",
    "h.{i}.attn.c_attn.bias": "layers.{i}.attention.qkv.bias",
    "h.{i}.attn.c_proj.weight": "layers.{i}.attention.out.weight transposed",
    "h.{i}.attn.c_proj.bias": "layers.{i}.attention.out.bias",
    "h.{i}.mlp.c_fc.weight": "layers.{i}.mlp.up.weight transposed",
    "h.{i}.mlp.c_fc.bias": "layers.{i}.mlp.up.bias",
    "h.{i}.mlp.c_proj.weight": "layers.{i}.mlp.down.weight transposed",
    "h.{i}.mlp.c_proj.bias": "layers.{i}.mlp.down.bias",
}
GPT2 |= {"transformer." + name: target for name, target in GPT2.items()}
GPT2 |= {"lm_head.weight": "head.weight"}
GPTJ = {
    "transformer.wte.weight": "embed.weight",
    "transformer.wpe.weight": "positions.weight",
    "transformer.ln_f.*": "norm.*",
    "lm_head.*": "head.*",
    T + "ln_1.*": "layers.{i}.attention_norm.*",
    T + "ln_2.*": "layers.{i}.mlp_norm.*",
    T + "mlp.fc_in.*": "layers.{i}.mlp.up.*",
    T + "mlp.fc_out.*": "layers.{i}.mlp.down.*",
    T + "mlp.c_fc.*": "layers.{i}.mlp.up.*",
    T + "mlp.c_proj.*": "layers.{i}.mlp.down.*",
} | {
    f"{T}attn.{inner}{part}": f"layers.{{i}}.attention.{ours}"
    for inner in ("", "attention.")
    for part, ours in {
        "q_proj.*": "qkv.* q",
        "k_proj.*": "qkv.* k",
        "v_proj.*": "qkv.* v",
        "out_proj.*": "out.*",
    }.items()
}
D = "model.decoder.layers.{i}."
OPT = {
    "model.decoder.embed_tokens.weight": "embed.weight",
    "model.decoder.embed_positions.weight": "positions.weight",
    "model.decoder.project_in.weight": "project_in.weight",
    "model.decoder.project_out.weight": "project_out.weight",
    "model.decoder.final_layer_norm.*": "norm.*",
    "lm_head.weight": "head.weight",
    D + "self_attn_layer_norm.*": "layers.{i}.attention_norm.*",
    D + "final_layer_norm.*": "layers.{i}.mlp_norm.*",
    D + "self_attn.q_proj.*": "layers.{i}.attention.qkv.* q",
    D + "self_attn.k_proj.*": "layers.{i}.attention.qkv.* k",
    D + "self_attn.v_proj.*": "layers.{i}.attention.qkv.* v",
    D + "self_attn.out_proj.*": "layers.{i}.attention.out.*",
    D + "fc1.*": "layers.{i}.mlp.up.*",
    D + "fc2.*": "layers.{i}.mlp.down.*",
}
XGLM = {  # OPT's, one floor up
    name.replace("decoder.", ""): target
    for name, target in OPT.items()
    if "final_layer_norm" not in name or "{i}" in name
} | {"model.layer_norm.*": "norm.*"}
OPT |= {name.removeprefix("model."): target for name, target in OPT.items()}
N = "gpt_neox.layers.{i}."
GPT_NEOX = {
    "gpt_neox.embed_in.weight": "embed.weight",
    "gpt_neox.final_layer_norm.*": "norm.*",
    "embed_out.weight": "head.weight",
    "lm_head.weight": "head.weight",
    N + "input_layernorm.*": "layers.{i}.attention_norm.*",
    N + "post_attention_layernorm.*": "layers.{i}.mlp_norm.*",
    N + "attention.query_key_value.*": "layers.{i}.attention.qkv.* heads-apart",
    N + "attention.dense.*": "layers.{i}.attention.out.*",
    N + "mlp.dense_h_to_4h.*": "layers.{i}.mlp.up.*",
    N + "mlp.dense_4h_to_h.*": "layers.{i}.mlp.down.*",
}


def experts(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
    """One tensor an expert."""
    return {
        prefix + f"experts.{{e}}.{gate}.weight": "layers.{i}.mlp.up {e} gate",
        prefix + f"experts.{{e}}.{up}.weight": "layers.{i}.mlp.up {e} up",
        prefix + f"experts.{{e}}.{down}.weight": "layers.{i}.mlp.down {e}",
        prefix + "gate.weight": "layers.{i}.mlp.router.weight",
    }


def plus_one(names: Mapping[str, str]) -> dict[str, str]:
    """Gemma stores the weights of its norms less one."""
    return {k: v + " plus-one" if "norm" in v else v for k, v in names.items()}


# ── the table ─────────────────────────────────────────────────────────────────────────────────

E = L + "mlp.experts."
FAMILIES: dict[str, Family] = {
    "llama": Family(llama, LLAMA, skip=(r".*rotary_emb\.inv_freq",)),
    "mistral": Family(lambda h: llama(h, windows=sliding(h, None)), LLAMA),
    "qwen2": Family(
        lambda h: llama(h, qkv_bias=True, out_bias=False, windows=qwen_windows(h)), LLAMA
    ),
    "qwen3": Family(_qwen3, LLAMA | QK_NORM),
    "qwen3_moe": Family(
        qwen3_moe,
        LLAMA | QK_NORM | experts(L + "mlp.", "gate_proj", "up_proj", "down_proj"),
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        LLAMA
        | experts(L + "mlp.", "gate_proj", "up_proj", "down_proj")
        | {
            L + "mlp.shared_expert.gate_proj.weight": "layers.{i}.mlp.shared.up.weight gate",
            L + "mlp.shared_expert.up_proj.weight": "layers.{i}.mlp.shared.up.weight up",
            L + "mlp.shared_expert.down_proj.weight": "layers.{i}.mlp.shared.down.weight",
            L + "mlp.shared_expert_gate.weight": "layers.{i}.mlp.shared_gate.weight",
        },
    ),
    "mixtral": Family(_mixtral, LLAMA | experts(L + "block_sparse_moe.", "w1", "w3", "w2")),
    "phi3": Family(lambda h: llama(h, windows=sliding(h, None)), LLAMA | FUSED),
    "smollm3": Family(_smollm3, LLAMA),
    "granite": Family(_granite, LLAMA),
    "olmo2": Family(lambda h: llama(h, norms="output", qk_norm="full"), LLAMA | OLMO2),
    "gemma": Family(gemma, plus_one(LLAMA)),
    "gemma2": Family(partial(gemma2, pattern=2), plus_one(GEMMA2)),
    "gemma3_text": Family(gemma3, plus_one(GEMMA2)),
    "glm4": Family(
        _glm4,
        LLAMA
        | FUSED
        | {
            L + "post_self_attn_layernorm.weight": "layers.{i}.attention_out_norm.weight",
            L + "post_mlp_layernorm.weight": "layers.{i}.mlp_out_norm.weight",
        },
    ),
    "cohere": Family(_cohere, LLAMA | QK_NORM),
    "stablelm": Family(
        _stablelm,
        LLAMA
        | {
            L + f"self_attn.{x}_layernorm.norms.{{e}}.*": f"layers.{{i}}.attention.{x}_norm.* {{e}}"
            for x in "qk"
        },
    ),
    "starcoder2": Family(
        _starcoder2,
        LLAMA
        | {L + "mlp.c_fc.*": "layers.{i}.mlp.up.*", L + "mlp.c_proj.*": "layers.{i}.mlp.down.*"},
    ),
    "phi": Family(
        _phi,
        LLAMA
        | {
            "model.final_layernorm.*": "norm.*",
            L + "self_attn.dense.*": "layers.{i}.attention.out.*",
            L + "self_attn.q_layernorm.*": "layers.{i}.attention.q_norm.*",
            L + "self_attn.k_layernorm.*": "layers.{i}.attention.k_norm.*",
            L + "mlp.fc1.*": "layers.{i}.mlp.up.*",
            L + "mlp.fc2.*": "layers.{i}.mlp.down.*",
        },
    ),
    "gpt_oss": Family(
        _gpt_oss,
        LLAMA
        | {
            L + "self_attn.sinks": "layers.{i}.attention.sinks",
            L + "mlp.router.*": "layers.{i}.mlp.router.*",
            E + "gate_up_proj": "layers.{i}.mlp.up transposed gate-first",
            E + "gate_up_proj_bias": "layers.{i}.mlp.up_bias gate-first",
            E + "down_proj": "layers.{i}.mlp.down transposed",
            E + "down_proj_bias": "layers.{i}.mlp.down_bias",
        },
    ),
    "gpt2": Family(_gpt2, GPT2, skip=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)),
    "gpt_neo": Family(gpt_neo, GPTJ, skip=(r".*\.attn\.attention\.(bias|masked_bias)",)),
    "gptj": Family(_gptj, GPTJ, skip=(r".*\.attn\.(bias|masked_bias)",)),
    "gpt_neox": Family(
        _gpt_neox,
        GPT_NEOX,
        skip=(r".*\.attention\.(bias|masked_bias)", r".*rotary_emb\.inv_freq"),
    ),
    "opt": Family(opt, OPT),
    "xglm": Family(_xglm, XGLM, skip=(r"model\.embed_positions\.weights",)),
    "bloom": Family(_bloom, BLOOM),
    "falcon": Family(falcon, BLOOM),
}


def family_of(h: Json) -> tuple[str, Family]:
    """The entry for a config.json, by its model_type."""
    kind = h.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"architecture {h.get('architectures') or kind!r} is not supported; "
            f"supported are {', '.join(sorted(FAMILIES))}"
        )
    return kind, FAMILIES[kind]
