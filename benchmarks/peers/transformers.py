"""transformers' `generate` on one batch that begins and ends together."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=form).eval()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        given = torch.tensor(prompts)
        said = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=beams,
            do_sample=False,
            pad_token_id=0,
        )
        found: list[list[int]] = said[:, given.shape[1] :].tolist()
        return found
