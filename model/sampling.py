"""How a successor is chosen: one branch's parameters, and the same for many seats as tensors."""

import msgspec
import numpy as np
import numpy.typing as npt


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a branch's draws depend on besides the logits.

    The order of the transforms is transformers': bad words, min_tokens, allowed ids and bias;
    repetition, then frequency and presence penalties; temperature; top-k; top-p; min-p; typical-p.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all; 1 is greedy
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and output
    frequency_penalty: float = 0.0  # over output
    presence_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = {}
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed;
    # what completes those of several tokens is in the masks of a `Batch`
    allowed: tuple[int, ...] = ()  # empty: every id
    min_tokens: int = 0  # until then, `stops` cannot be drawn
    stops: tuple[int, ...] = ()  # ids that would end the text: eos and stop ids
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0 or self.top_k == 1

    @property
    def looks_back(self) -> bool:
        """Whether a draw depends on the tokens before it, beyond the logits."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


def packed(truths: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Truths [n] as bits [⌈n / 32⌉], the first the lowest."""
    bits = np.zeros(-(-len(truths) // 32) * 32, np.uint8)
    bits[: len(truths)] = truths
    words: npt.NDArray[np.int32] = np.packbits(bits, bitorder="little").view(np.int32)
    return words
