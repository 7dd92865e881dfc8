"""The network that every engine gets: noise in a known shape, as a folder that all converters read.

Stored as real ones of such a shape are: Llama's in bfloat16, GPT-2's in float32. The last norm is 8
instead of 1: logits of noise are nearly flat, and with these a greedy choice is not a matter of
rounding.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SHARPNESS = 8.0
LLAMA = {"architecture": "llama", "stored": "bfloat16", "context": 2048, "epsilon": 1e-6}
GPT2 = {"architecture": "gpt2", "stored": "float32", "context": 1024}
SHAPES: dict[str, dict[str, Any]] = {
    "check": LLAMA
    | {"hidden": 256, "layers": 3, "heads": 4, "kv_heads": 2, "inner": 512, "vocabulary": 2048}
    | {"noise": 0.12},
    "check-gpt2": GPT2
    | {"hidden": 256, "layers": 3, "heads": 4, "kv_heads": 4, "inner": 1024, "vocabulary": 2048}
    | {"noise": 0.12},
    "gpt2-124m": GPT2
    | {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 12, "inner": 3072}
    | {"vocabulary": 50_257, "noise": 0.02},
    "llama-0.5b": LLAMA
    | {"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "inner": 4864}
    | {"vocabulary": 151_936, "noise": 0.02},
    "llama-3.2-1b": LLAMA
    | {"hidden": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "inner": 8192}
    | {"vocabulary": 128_256, "noise": 0.02},
}
SHAPES["llama-0.5b-float32"] = SHAPES["llama-0.5b"] | {"stored": "float32"}


def weights(shape: dict[str, Any]) -> int:
    """How many there are in the matrices of the layers: a token is multiplied by each once."""
    wide, inner = shape["hidden"], shape["inner"]
    kv = wide // shape["heads"] * shape["kv_heads"]
    matrices = 3 if shape["architecture"] == "llama" else 2
    layer = 2 * wide * wide + 2 * wide * kv + matrices * wide * inner
    return int(layer * shape["layers"])


def write(shape: dict[str, Any], folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    config = _gpt2(shape) if shape["architecture"] == "gpt2" else _llama(shape)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    final = model.transformer.ln_f if shape["architecture"] == "gpt2" else model.model.norm
    final.weight.data.fill_(SHARPNESS)
    model.to(getattr(torch, shape["stored"])).save_pretrained(folder)
    _words(shape["vocabulary"], folder)


def _llama(shape: dict[str, Any]) -> Any:
    import transformers

    return transformers.LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=shape["context"],
        rms_norm_eps=shape["epsilon"],
        initializer_range=shape["noise"],
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
    )


def _gpt2(shape: dict[str, Any]) -> Any:
    import transformers

    return transformers.GPT2Config(
        n_embd=shape["hidden"],
        n_inner=shape["inner"],
        n_layer=shape["layers"],
        n_head=shape["heads"],
        n_positions=shape["context"],
        vocab_size=shape["vocabulary"],
        initializer_range=shape["noise"],
        bos_token_id=1,
        eos_token_id=0,
    )


def _words(vocabulary: int, folder: Path) -> None:
    """A byte-level tokenizer with a spelling for each id: letters, pairs of them, and triples."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters]
    triples = ((a + b, c) for a, b in pairs for c in letters)
    merges = [*pairs, *(next(triples) for _ in range(vocabulary))][: vocabulary - len(letters) - 2]
    ids = {word: i for i, word in enumerate(["<eos>", "<bos>", *letters])}
    ids |= {a + b: i for i, (a, b) in enumerate(merges, len(ids))}
    made = Tokenizer(models.BPE(vocab=ids, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<eos>", "<bos>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<eos>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
