"""Keys and values in pages, and which rows read which: what a step's attention stands on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import memory
from kernels.backend import INTERPRETED
from kernels.pages import copy_pages
from kernels.sharing import Shared
from model.config import ModelConfig

PAGE = 16  # tokens of a page, unless told otherwise
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of pages with scales
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # that the CPU's kernels read
NOTHING = torch.empty(0, dtype=torch.int32)


@dataclass(slots=True)
class Rows:
    """A step's rows on the device. Without pages a row attends to its own tokens only."""

    positions: Tensor  # [tokens] int64
    starts: Tensor  # [rows + 1] int32, where each row's tokens begin
    longest_query: int  # tokens of the longest row in this step …
    longest_context: int  # … and with what it has in pages
    lengths: Tensor = NOTHING  # [rows] int32, context with this step's tokens
    page_table: Tensor = NOTHING  # [rows, widest] int32
    slots: Tensor = NOTHING  # [tokens] int64: page · page size + offset, where each token goes
    shared: Shared | None = None  # rows whose first pages are read once for all
    wanted: Tensor | None = None  # [wanted] int64, rising: tokens whose hidden state will be read;
    # those of others may be left unfinished. None: all

    @staticmethod
    def alone(counts: list[int], device: torch.device | str = "cpu") -> "Rows":
        """Whole texts of these many tokens, one after another, nothing in pages."""
        edges = [0]
        for count in counts:
            edges.append(edges[-1] + count)
        return Rows(
            positions=torch.cat([torch.arange(count) for count in counts]).to(device),
            starts=torch.tensor(edges, dtype=torch.int32, device=device),
            longest_query=max(counts),
            longest_context=max(counts),
        )


class Cache:
    """Every layer's pages in one tensor, so that one launch can copy a page of all layers.

    Float keys on a CPU lie across: all positions of a page for the first channel, then for the
    second, and so on, since its scores are of sixteen positions at a time.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int = PAGE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.layers, 2, pages, config.kv_heads, page_size, config.head_dim)
        self.pages = memory.zeros(shape, dtype, device)
        self.scales: Tensor | None = None  # a token and head, of pages in fewer bits
        if dtype in FORMATS.values():
            self.scales = torch.zeros(shape[:-1], device=device)
        self.page_size = page_size
        floats = self.pages.device.type == "cpu" and dtype in FLOATS.values()
        self.across = floats and page_size % 16 == 0 and not INTERPRETED

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [pages, kv_heads, page_size, head_dim]."""
        keys, values = self.pages[index]
        if self.across:
            keys = keys.view(*keys.shape[:2], keys.shape[3], keys.shape[2]).transpose(2, 3)
        return keys, values

    def copy(self, copies: Tensor) -> None:
        """copies [n, 3]: from page, to page, tokens; all of them where keys lie across"""
        if not self.across:
            copy_pages(self.pages, copies, self.scales)
            return
        for source, target, _ in copies.tolist():  # 15 times as fast as all in one operation
            self.pages[:, :, target] = self.pages[:, :, source]

    def layer_scales(self, index: int) -> dict[str, Tensor | None]:
        """Theirs, [pages, kv_heads, page_size]; None: they need none."""
        found = (None, None) if self.scales is None else self.scales[index].unbind(0)
        return dict(zip(("key_scales", "value_scales"), found, strict=True))

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        scale = 4 if dtype in FORMATS.values() else 0
        each = config.head_dim * dtype.itemsize + scale
        return config.layers * 2 * config.kv_heads * page_size * each
