"""ONNX Runtime GenAI, with the graph of its own builder; its 8 bits are in groups of 32."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai

PRECISIONS = {"float32": "fp32", "int8": "int8"}


def write(source: Path, folder: Path, form: str) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    paths = ["-i", str(source), "-o", str(folder), "-c", str(folder / "cache")]
    kind = ["-p", PRECISIONS[form], "-e", "cpu"]
    status = subprocess.run([*builder, *paths, *kind], check=False).returncode
    if status:
        sys.exit(status)  # it has said why


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:  # noqa: ARG002
        config = genai.Config(str(folder))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        length = len(prompts[0])
        how = genai.GeneratorParams(self.model)
        how.set_search_options(
            batch_size=len(prompts),
            num_beams=beams,
            min_length=length + new,
            max_length=length + new,
            do_sample=False,
        )
        generator = genai.Generator(self.model, how)
        generator.append_tokens(np.array(prompts, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        rows = range(0, len(prompts) * beams, beams)
        return [generator.get_sequence(row)[length:].tolist() for row in rows]
