"""CTranslate2, with the weights that its own converter makes."""

import json
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from ctranslate2.converters import TransformersConverter


def write(source: Path, folder: Path, form: str) -> None:
    TransformersConverter(str(source)).convert(str(folder), quantization=form, force=True)


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        self.words = json.loads((folder / "vocabulary.json").read_text())
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=form, inter_threads=1, intra_threads=threads
        )

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        """Ids go in as words: it has no other way."""
        said = self.generator.generate_batch(
            [[self.words[token] for token in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            beam_size=beams,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [list(one.sequences_ids[0]) for one in said]
