"""What the routes know of the model that is served."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.config import Limits
from server.errors import ModelNotFound


class Words(Protocol):
    """What model.tokenizer.Tokenizer does."""

    @property
    def eos(self) -> int | None: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def special(self) -> dict[str, int]: ...
    def encode(self, text: str, *, special: bool = False, bos: bool = True) -> list[int]: ...
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...
    def __hash__(self) -> int: ...  # by which their texts are remembered


class Template(Protocol):
    """What model.chat.ChatTemplate does."""

    source: str

    def render_ids(
        self, tokenizer: Any, messages: list[dict[str, Any]], /, *args: Any, **more: Any
    ) -> tuple[str, list[int]]: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    names: tuple[str, ...]  # the first is the one in answers
    words: Words
    template: Template | None
    context: int  # longest prompt + answer, in tokens
    vocabulary: int
    capacity: int  # tokens that the KV pages hold
    eos: tuple[int, ...]  # every id that ends a text
    created: int  # seconds since 1970, of the start
    fingerprint: str  # changes whenever answers could
    limits: Limits
    about: dict[str, Any] = field(default_factory=dict)  # for people: device, kernels, …

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, asked: str | None) -> None:
        """A model is named, or not at all."""
        if asked is not None and asked not in self.names:
            raise ModelNotFound(
                f"There is no model {asked[:80]!r} here; this server has {self.name!r}.", "model"
            )


FILL_IN = (  # special tokens: before the prefix, before the suffix, before the middle
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def fill_in_tokens(words: Words) -> tuple[int, int, int] | None:
    """The ids for filling in the middle, when the model was taught to."""
    for prefix, suffix, middle in FILL_IN:
        special = words.special
        if prefix in special and suffix in special and middle in special:
            return special[prefix], special[suffix], special[middle]
    return None
