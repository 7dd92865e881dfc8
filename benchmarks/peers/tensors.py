"""The source's tensors under plain names, each [outputs, inputs], for those who write a format."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

LLAMA = {
    "input_layernorm": "norm1",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "post_attention_layernorm": "norm2",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "embed_tokens": "embed",
    "norm": "norm",
}
GPT2 = {
    "ln_1": "norm1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "o",
    "ln_2": "norm2",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "wte": "embed",
    "wpe": "positions",
    "ln_f": "norm",
}


class Source:
    """(name, "weight" or "bias", float32) of each; a layer's names begin with its number."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        self.architecture = about["model_type"]
        gpt2 = self.architecture == "gpt2"
        self.hidden = about["n_embd" if gpt2 else "hidden_size"]
        self.layers = about["n_layer" if gpt2 else "num_hidden_layers"]
        self.heads = about["n_head" if gpt2 else "num_attention_heads"]
        self.kv_heads = self.heads if gpt2 else about["num_key_value_heads"]
        self.inner = about["n_inner" if gpt2 else "intermediate_size"]
        self.epsilon = about["layer_norm_epsilon" if gpt2 else "rms_norm_eps"]
        self.context = about["n_positions" if gpt2 else "max_position_embeddings"]
        self.vocabulary = about["vocab_size"]
        self.theta = 0.0 if gpt2 else about["rope_parameters"]["rope_theta"]
        self.head_dim = self.hidden // self.heads
        self._tensors = load_file(folder / "model.safetensors")

    def __iter__(self) -> Iterator[tuple[str, str, np.ndarray]]:
        for name, tensor in self._tensors.items():
            array = tensor.float().numpy()
            path, _, kind = name.rpartition(".")
            plain = _plain(path)
            if self.architecture == "gpt2" and plain.rpartition(".")[2] in (
                "qkv",
                "o",
                "up",
                "down",
            ):
                array = np.ascontiguousarray(array.T) if kind == "weight" else array
            yield plain, kind, array


def _plain(path: str) -> str:
    """transformer.h.3.attn.c_attn → 3.qkv"""
    _, _, rest = path.partition(".")
    if rest.startswith(("layers.", "h.")):
        _, layer, part = rest.split(".", 2)
        return f"{layer}.{(LLAMA | GPT2)[part]}"
    return (LLAMA | GPT2)[rest]
