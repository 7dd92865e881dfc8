"""llama.cpp, below its Python class: a batch of sequences a step, greedy choices in numpy.

The file is written in float32 and quantised by its own quantiser, as people's files are.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as llama
import numpy as np

from benchmarks.peers import CONTEXT, STREAMS, Beyond
from benchmarks.peers.tensors import Source

STEP = 2048  # tokens
NAMES = {
    "norm1": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "qkv": "attn_qkv",
    "o": "attn_output",
    "norm2": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


def write(source: Path, folder: Path, form: str) -> None:
    plain = folder / "F32.gguf"
    _write_float32(Source(source), plain)
    if form == "F32":
        return
    how = llama.llama_model_quantize_default_params()
    how.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{form}")
    target = str(folder / f"{form}.gguf").encode()
    if llama.llama_model_quantize(str(plain).encode(), target, ctypes.byref(how)):
        raise RuntimeError(f"llama.cpp could not quantise to {form}")
    plain.unlink()


def _write_float32(source: Source, path: Path) -> None:
    gpt2 = source.architecture == "gpt2"
    out = gguf.GGUFWriter(path, source.architecture)
    out.add_context_length(source.context)
    out.add_embedding_length(source.hidden)
    out.add_block_count(source.layers)
    out.add_feed_forward_length(source.inner)
    out.add_head_count(source.heads)
    out.add_head_count_kv(source.kv_heads)
    (out.add_layer_norm_eps if gpt2 else out.add_layer_norm_rms_eps)(source.epsilon)
    out.add_vocab_size(source.vocabulary)
    out.add_tokenizer_model("no_vocab")
    if not gpt2:
        out.add_rope_dimension_count(source.head_dim)
        out.add_rope_freq_base(source.theta)
    for name, kind, array in source:
        if name.endswith((".q", ".k")):
            array = _interleave(array, source.head_dim)
        out.add_tensor(_name(name, kind), array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _name(name: str, kind: str) -> str:
    whole = {"embed": "token_embd", "positions": "position_embd", "norm": "output_norm"}
    layer, _, part = name.rpartition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}" if layer else f"{whole[part]}.{kind}"


def _interleave(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Its rotation turns neighbours, the source's turns halves."""
    halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        llama.llama_backend_init()
        path = str(folder / f"{form}.gguf").encode()
        how = llama.llama_model_default_params()
        self.model = llama.llama_model_load_from_file(path, how)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {form}")
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.context = llama.llama_init_from_model(self.model, _context(form, threads))
        self.batch = llama.llama_batch_init(STEP, 0, 1)

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        if beams > 1:
            raise Beyond("it has no beam search")
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)
        said: list[list[int]] = [[] for _ in prompts]
        for stream, prompt in enumerate(prompts):  # as many prompts at once as fit in a step
            self._put(stream, 0, prompt)
            if stream + 1 == len(prompts) or self.batch.n_tokens + len(prompt) > STEP:
                self._step(said)
        for at in range(len(prompts[0]), len(prompts[0]) + new - 1):
            for stream in range(len(prompts)):
                self._put(stream, at, said[stream][-1:])
            self._step(said)
        return said

    def _put(self, stream: int, at: int, tokens: Sequence[int]) -> None:
        batch = self.batch
        for i, token in enumerate(tokens):
            n = batch.n_tokens
            batch.token[n], batch.pos[n] = token, at + i
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, stream
            batch.logits[n] = i == len(tokens) - 1
            batch.n_tokens += 1

    def _step(self, said: list[list[int]]) -> None:
        """Compute what was put, and let every sequence that asked say its best token."""
        batch = self.batch
        status = llama.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode says {status}")
        for n in range(batch.n_tokens):
            if batch.logits[n]:
                logits = llama.llama_get_logits_ith(self.context, n)
                row = np.ctypeslib.as_array(logits, (self.vocabulary,))
                said[batch.seq_id[n][0]].append(int(row.argmax()))
        batch.n_tokens = 0


def _context(form: str, threads: int) -> Any:
    how = llama.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_seq_max = STREAMS * CONTEXT, STEP, STREAMS
    how.n_threads = how.n_threads_batch = threads
    if form == "F32":  # keys and values too, or greedy choices differ
        how.type_k = how.type_v = gguf.GGMLQuantizationType.F32
    return how
