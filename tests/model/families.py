"""One row a family: the tiny checkpoints that transformers makes, and what is odd about each.

Random initialisation gives nearly flat logits, so matrices are scaled up; norms and biases get
noise, so that one left out would show.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers

BASE = {
    "vocab_size": 67,  # not a multiple of 8
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "sliding_window": 5,  # smaller than the prompts
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "rotary_dim": 8,
    "ffn_dim": 48,
    "ffn_hidden_size": 96,
    "word_embed_proj_dim": 64,
    "num_kv_heads": 2,
    "window_size": 5,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
SCALED = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# label: (transformers' model_type, what differs from BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-in-sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "local"], 1]]},
    ),
    "opt": ("opt", {"pad_token_id": 1}),
    "opt-post-norm": (
        "opt",
        {"pad_token_id": 1, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "bloom": ("bloom", {}),
    "bloom-six-heads": ("bloom", {"hidden_size": 96, "num_attention_heads": 6}),
    "xglm": ("xglm", {}),
    "falcon-multi-query": ("falcon", {}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True}),
    "falcon-alibi": (
        "falcon",
        {
            "alibi": True,
            "multi_query": False,
            "num_kv_heads": 4,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "gptj": ("gptj", {}),
    "phi": ("phi", {}),
    "phi-normed": ("phi", {"qk_layernorm": True}),
    "phi3": ("phi3", {}),
    "llama": ("llama", {}),
    "llama-group-of-7": (
        "llama",
        {
            "hidden_size": 70,
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "head_dim": 96,
            "attention_bias": True,
        },
    ),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": SCALED | {"rope_type": "linear"}}),
    "llama-dynamic": ("llama", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}),
    "llama-yarn": ("llama", {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [1], "norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0]}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"layer_types": ALTERNATING, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"layer_types": ALTERNATING, "query_pre_attn_scalar": 16}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "sliding_window": None}),
    "starcoder2": ("starcoder2", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "cohere": ("cohere", {"logit_scale": 2.0}),
    "cohere-normed": ("cohere", {"use_qk_norm": True, "logit_scale": 2.0}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "glm4": ("glm4", {}),
    "gpt_oss": ("gpt_oss", {"layer_types": ALTERNATING}),
}


def make(label: str, folder: Path, **more: Any) -> Any:
    """Saves the checkpoint of a row, and returns transformers' model of it."""
    kind, differs = CASES[label]
    differs = differs | more
    config_class = type(transformers.AutoConfig.for_model(kind))
    accepted = set(inspect.signature(config_class.__init__).parameters)
    accepted |= set(getattr(config_class, "__dataclass_fields__", {}))
    accepted |= set(config_class.attribute_map) - {"num_heads", "window_size"}
    wanted = {key: value for key, value in BASE.items() if key in accepted} | differs
    torch.manual_seed(sum(label.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config_class(**wanted))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return model.eval()
