"""OpenVINO GenAI's continuous batching, over a graph written here operation by operation.

The graph has the shape that its own exporter gives: states for keys and values, `beam_idx`, and
norms, rotations and weights of 8 bits (per output, symmetric) or 4 (in groups of 128, the table of
8), in the forms that its CPU fuses.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
import openvino_tokenizers
from openvino import opset13 as ov
from transformers import AutoTokenizer

from benchmarks.peers import CONTEXT, STREAMS
from benchmarks.peers.tensors import Source

PAGE = 32  # tokens, on a CPU
GROUP = 128  # weights a scale, of 4 bits


def write(source: Path, folder: Path, form: str) -> None:
    model = Graph(Source(source), form).build()
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    words = AutoTokenizer.from_pretrained(source)
    for name, part in zip(
        ("tokenizer", "detokenizer"),
        openvino_tokenizers.convert_tokenizer(words, with_detokenizer=True),
    ):
        openvino.save_model(part, folder / f"openvino_{name}.xml")
    (folder / "config.json").write_text((source / "config.json").read_text())


class Graph:
    """Tensors are [rows, tokens, channels], and [rows, heads, tokens, channels] in attention."""

    def __init__(self, source: Source, form: str) -> None:
        self.source, self.form = source, form
        self.tensors = {f"{name}.{kind}": array for name, kind, array in source}
        self.ids = self._input("input_ids", [-1, -1])
        self.mask = self._input("attention_mask", [-1, -1])
        self.at = self._input("position_ids", [-1, -1])
        self.beams = self._input("beam_idx", [-1], np.int32)
        self.sinks: list[Any] = []
        self.table = self._weight("embed")

    def _input(self, name: str, shape: list[int], kind: Any = np.int64) -> Any:
        made = ov.parameter(shape, kind, name=name)
        made.output(0).get_tensor().set_names({name})
        return made

    def build(self) -> openvino.Model:
        x = ov.gather(self.table, self.ids, 0)
        if "positions.weight" in self.tensors:
            x = ov.add(x, ov.gather(self.tensors["positions.weight"], self.at, 0))
        else:
            self.cos, self.sin = self._angles()
        self.allowed = self._allowed()
        for layer in range(self.source.layers):
            x = ov.add(x, self._attend(layer, self._norm(x, f"{layer}.norm1")))
            x = ov.add(x, self._feed(layer, self._norm(x, f"{layer}.norm2")))
        logits = ov.matmul(self._norm(x, "norm"), self.table, False, True)
        logits.output(0).get_tensor().set_names({"logits"})
        inputs = [self.ids, self.mask, self.at, self.beams]
        return openvino.Model([ov.result(logits)], self.sinks, inputs, "source")

    def _weight(self, name: str) -> Any:
        weight = self.tensors[f"{name}.weight"]
        if self.form == "float32":
            return ov.constant(weight)
        if self.form == "int4" and name != "embed":
            return self._four_bits(weight)
        scale = np.abs(weight).max(1, keepdims=True) / 127
        stored = ov.constant(np.round(weight / scale).astype(np.int8))
        return ov.multiply(ov.convert(stored, "f32"), ov.constant(scale.astype(np.float32)))

    def _four_bits(self, weight: Any) -> Any:
        cut = weight.reshape(len(weight), -1, GROUP)
        scale = np.abs(cut).max(2, keepdims=True) / 7
        values = np.round(cut / scale).astype(np.int8).reshape(-1, 2) & 15
        packed = (values[:, 0] | values[:, 1] << 4).astype(np.uint8)
        tensor = openvino.Tensor(packed, openvino.Shape(cut.shape), openvino.Type.i4)
        stored = ov.constant(tensor, False)  # a copy: else the memory would be ours to keep
        scales = ov.constant(scale.astype(np.float16))
        whole = ov.multiply(ov.convert(stored, "f16"), scales)
        return ov.convert(ov.reshape(whole, list(weight.shape), False), "f32")

    def _linear(self, x: Any, name: str) -> Any:
        y = ov.matmul(x, self._weight(name), False, True)
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else ov.add(y, bias[None, None])

    def _norm(self, x: Any, name: str) -> Any:
        weight, epsilon = self.tensors[f"{name}.weight"][None, None], self.source.epsilon
        if self.source.architecture == "gpt2":
            y = ov.mvn(x, [-1], True, epsilon, "inside_sqrt")
            return ov.add(ov.multiply(y, weight), self.tensors[f"{name}.bias"][None, None])
        square = ov.reduce_mean(ov.power(x, np.float32(2)), [-1], True)
        root = ov.sqrt(ov.add(square, np.float32(epsilon)))
        return ov.multiply(weight, ov.multiply(x, ov.divide(np.float32(1), root)))

    def _angles(self) -> tuple[Any, Any]:
        """Cosine and sine, [rows, 1, tokens, head channels]."""
        half = np.arange(0, self.source.head_dim, 2, dtype=np.float32) / self.source.head_dim
        speed = (self.source.theta**-half).astype(np.float32)[None, None, None]
        at = ov.unsqueeze(ov.convert(ov.unsqueeze(self.at, 1), "f32"), -1)
        angle = ov.multiply(at, speed)
        both = ov.concat([angle, angle], -1)
        return ov.cos(both), ov.sin(both)

    def _rotate(self, x: Any) -> Any:
        half = self.source.head_dim // 2
        split = ov.variadic_split(x, -1, [half, half])
        turned = ov.concat([ov.multiply(split.output(1), np.float32(-1)), split.output(0)], -1)
        return ov.add(ov.multiply(x, self.cos), ov.multiply(turned, self.sin))

    def _allowed(self) -> Any:
        """0 where a token may look, else very little: [rows, 1, tokens, all tokens]."""
        count = ov.gather(ov.shape_of(self.mask), 1, 0)
        others = ov.range(np.int64(0), count, np.int64(1), "i64")
        seen = ov.less_equal(others, ov.unsqueeze(ov.unsqueeze(self.at, 1), -1))
        return ov.select(seen, np.float32(0), np.float32(-65504))

    def _attend(self, layer: int, x: Any) -> Any:
        source = self.source
        if f"{layer}.qkv.weight" in self.tensors:
            parts = ov.split(self._linear(x, f"{layer}.qkv"), 2, 3).outputs()
        else:
            parts = [self._linear(x, f"{layer}.{one}") for one in "qkv"]
        heads = (source.heads, source.kv_heads, source.kv_heads)
        q, k, v = (self._heads(part, count) for part, count in zip(parts, heads))
        if source.architecture != "gpt2":
            q, k = self._rotate(q), self._rotate(k)
        k, v = self._keep(k, f"{layer}.key"), self._keep(v, f"{layer}.value")
        y = ov.scaled_dot_product_attention(q, k, v, self.allowed)
        y = ov.reshape(ov.transpose(y, [0, 2, 1, 3]), [0, 0, source.hidden], True)
        return self._linear(y, f"{layer}.o")

    def _heads(self, x: Any, count: int) -> Any:
        shape = [0, 0, count, self.source.head_dim]
        return ov.transpose(ov.reshape(x, shape, True), [0, 2, 1, 3])

    def _keep(self, x: Any, name: str) -> Any:
        """What the state has, with x behind it; one head for each of the queries'."""
        source = self.source
        rows = ov.unsqueeze(ov.gather(ov.shape_of(self.ids), 0, 0), 0)
        empty = ov.concat([rows, np.array([source.kv_heads, 0, source.head_dim])], 0)
        begin = ov.broadcast(np.float32(0), empty)
        shape = [-1, source.kv_heads, -1, source.head_dim]
        past = ov.read_value(begin, name, openvino.Type.f32, openvino.PartialShape(shape))
        whole = ov.concat([ov.gather(past, self.beams, 0), x], 2)
        self.sinks.append(ov.assign(whole, name))
        return self._repeat(whole)

    def _repeat(self, x: Any) -> Any:
        source = self.source
        times = source.heads // source.kv_heads
        if times == 1:
            return x
        sizes = ov.shape_of(x)
        first, rest = ov.gather(sizes, [0, 1], 0), ov.gather(sizes, [2, 3], 0)
        wide = ov.broadcast(
            ov.unsqueeze(x, 2), ov.concat([first, np.array([times]), rest], 0), "BIDIRECTIONAL"
        )
        return ov.reshape(wide, [0, source.heads, -1, source.head_dim], True)

    def _feed(self, layer: int, x: Any) -> Any:
        up = self._linear(x, f"{layer}.up")
        if f"{layer}.gate.weight" in self.tensors:
            up = ov.multiply(ov.swish(self._linear(x, f"{layer}.gate")), up)
        else:
            up = ov.gelu(up, "tanh")
        return self._linear(up, f"{layer}.down")


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        plan = genai.SchedulerConfig()
        plan.num_kv_blocks = STREAMS * CONTEXT // PAGE
        plan.max_num_batched_tokens, plan.max_num_seqs = 2048, STREAMS
        plan.enable_prefix_caching = False
        how: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        if form == "float32":  # else its CPU takes bfloat16, and 8 bits for keys and values
            how |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.pipeline = genai.ContinuousBatchingPipeline(str(folder), plan, "CPU", how, {})

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        how = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, ignore_eos=True)
        how.do_sample = False
        if beams > 1:
            how.num_beams, how.num_return_sequences = beams, 1
        given = [openvino.Tensor(np.array([prompt])) for prompt in prompts]
        said = self.pipeline.generate(given, [how] * len(prompts))
        return [list(one.m_generation_ids[0]) for one in said]
