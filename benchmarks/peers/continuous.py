"""transformers' continuous batching: its paged cache and scheduler, in a thread of the process."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.peers import CONTEXT, STREAMS, Beyond

PAGE = 32


class Peer:
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=form).eval()
        self.manager = self.model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=STREAMS * CONTEXT // PAGE,
                max_batch_tokens=2048,
                allow_block_sharing=False,
            ),
        )
        self.manager.start()

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        if beams > 1:
            raise Beyond("it has no beam search")
        names = [self.manager.add_request(prompt, max_new_tokens=new) for prompt in prompts]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            said = self.manager.get_result(timeout=1)
            if said is None and not self.manager.is_running():
                raise RuntimeError("its thread has ended")
            if said is not None and said.is_finished():
                if said.error:
                    raise RuntimeError(said.error)
                done[said.request_id] = list(said.generated_tokens)
        return [done[name] for name in names]
