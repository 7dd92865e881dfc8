"""On a GPU: what the interpreter cannot show. Every variant, races, graphs, real sizes."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.attention import attention, attention_reference
from kernels.backend import KERNELS, Call, call, differs
from tests.kernels.variants import variants

for file in Path(kernels.__file__).parent.glob("*.py"):
    import_module(f"kernels.{file.stem}")

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")
CASES = [(name, i) for name in sorted(KERNELS) for i in range(len(variants(name).probes))]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_every_variant_is_its_twin(name: str, i: int) -> None:
    kernel = KERNELS[name]
    assert kernel.choose(GPU).way == "triton", kernel.choose(GPU).reason
    for trial in kernel.trial(replace(variants(name).probes[i], device=GPU)):
        ways = call(kernel.triton, trial), call(kernel.twin, trial)
        assert differs(*ways, call(kernel.twin, trial, exactly=True)) == ""


def decode(rows: int, longest: int, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Call:
    """Rows of many lengths over pages in random order."""
    maker = torch.Generator(GPU).manual_seed(0)
    lengths = torch.randint(1, longest + 1, (rows,), generator=maker, device=GPU).int()
    width = -(-longest // 16)
    table = torch.randperm(rows * width, generator=maker, device=GPU).int().view(rows, width)
    shape = (rows * width, kv_heads, 16, dim)
    keys, values = (
        torch.randn(shape, generator=maker, device=GPU, dtype=torch.bfloat16) for _ in "kv"
    )
    query = torch.randn(rows, heads, dim, generator=maker, device=GPU, dtype=torch.bfloat16)
    kwargs: dict[str, Any] = {
        "starts": torch.arange(rows + 1, device=GPU).int(),
        "lengths": lengths,
        "page_table": table,
        "scale": dim**-0.5,
        "longest_query": 1,
        "longest_context": longest,
    }
    return Call((query, keys, values), kwargs)


@pytest.mark.parametrize(("rows", "longest"), [(1, 1000), (7, 9000), (64, 2000), (200, 700)])
def test_merging_parts_never_races(rows: int, longest: int) -> None:
    """The last block reads what others wrote: the same bits a hundred times, and the right ones."""
    made = decode(rows, longest)
    first = attention(*made.args, **made.kwargs)
    ways = [first], call(attention_reference, made)[:1]
    assert differs(*ways, call(attention_reference, made, exactly=True)[:1]) == ""
    for _ in range(100):
        assert torch.equal(attention(*made.args, **made.kwargs), first)


def test_a_row_is_the_same_bits_in_any_company() -> None:
    made = decode(48, 4000)
    together = attention(*made.args, **made.kwargs)
    for row in (0, 17, 47):
        alone = {
            "starts": made.kwargs["starts"][:2],
            "lengths": made.kwargs["lengths"][row : row + 1],
            "page_table": made.kwargs["page_table"][row : row + 1],
        }
        query = made.args[0][row : row + 1]
        one = attention(query, *made.args[1:], **(made.kwargs | alone))
        assert torch.equal(one[0], together[row])


def test_a_graph_follows_its_buffers() -> None:
    """Recorded with one set of lengths, replayed with others: nothing on the host decides."""
    made = decode(16, 3000)
    lengths: Tensor = made.kwargs["lengths"]
    attention(*made.args, **made.kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*made.args, **made.kwargs)
    for seed in range(5):
        maker = torch.Generator(GPU).manual_seed(seed)
        lengths.copy_(torch.randint(1, 3001, (16,), generator=maker, device=GPU))
        graph.replay()
        assert torch.equal(out, attention(*made.args, **made.kwargs))
