"""From our parameters to an ordinary checkpoint folder: the table of families, read backwards."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.families import FAMILIES

HERE = Path(__file__).parent


def hf_config(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers writes it for a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe["vocabulary"],
        "hidden_size": recipe["hidden"],
        "intermediate_size": recipe["feed_forward"],
        "num_hidden_layers": recipe["layers"],
        "num_attention_heads": recipe["heads"],
        "num_key_value_heads": recipe["kv_heads"],
        "head_dim": recipe["hidden"] // recipe["heads"],
        "max_position_embeddings": recipe["context"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": recipe["vocabulary"] - 1,
        "dtype": "float16",
    }


def names(config: ModelConfig) -> Iterator[str]:
    """Every tensor name of such a checkpoint."""
    for pattern in FAMILIES[config.family].names:
        pattern = pattern.replace("*", "weight")
        if pattern.startswith("lm_head") and config.tied:
            continue
        layers = range(config.layers) if "{i}" in pattern else [0]
        yield from (pattern.replace("{i}", str(layer)) for layer in layers)


def tensors(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    found = {}
    for name in names(config):
        place = FAMILIES[config.family].place(name, config)
        assert place is not None
        tensor = state[place.name] if place.rows is None else state[place.name][place.rows]
        found[name] = tensor.detach().to("cpu", torch.float16).contiguous()
    return found


def save_model(state: Mapping[str, Tensor], h: dict[str, Any], folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors; `bpe.save` adds the tokenizer."""
    config = FAMILIES["llama"].read("llama", h)
    save_file(tensors(state, config), folder / "model.safetensors", {"format": "pt"})
    settings = {"eos_token_id": h["eos_token_id"], "do_sample": False, "max_new_tokens": 64}
    for name, document in {"config.json": h, "generation_config.json": settings}.items():
        (folder / name).write_text(json.dumps(document, indent=1) + "\n")
