"""On a GPU: every kernel is trusted and used, and checkpoints answer as transformers does there."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import model.runner  # noqa: F401 (so that every kernel is defined)
from kernels.backend import KERNELS, Probe, verify
from model.cache import FORMATS, Cache
from model.quantize import FORMATS as WEIGHTS
from model.runner import Runner
from model.weights import load
from server import Engine
from tests.model.families import CASES, make
from tests.model.test_families import PAGE, assert_close, greedy, rows_in_pages, scattered_pages
from tests.model.test_graphs import ROWS, WIDTH, run

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_kernel_falls_back(dtype: torch.dtype) -> None:
    """A kernel that differs from its twin here, or does not run, would be replaced by it."""
    for choice in verify(Probe(GPU, dtype)):
        assert choice.way == "triton", f"{choice.kernel}: {choice.reason}"
    assert not any(kernel.faults for kernel in KERNELS.values())


@pytest.mark.parametrize("label", sorted(CASES))
def test_logits_are_those_of_transformers(label: str, tmp_path: Path) -> None:
    """Through pages, in two chunks; float32 closely, bfloat16 as closely as transformers' own."""
    theirs = make(label, tmp_path).to(GPU)
    prompt = torch.randint(2, 67, (23,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        exact = theirs(prompt[None].to(GPU)).logits[0].cpu()
        assert_close(_paged(tmp_path, prompt, torch.float32), exact)
        rounded = theirs.to(torch.bfloat16)(prompt[None].to(GPU)).logits[0].float().cpu()
        own = (rounded - exact).abs().max()
        ours = (_paged(tmp_path, prompt, torch.bfloat16) - exact).abs().max()
        assert ours <= 2 * own + 0.02 * exact.abs().max()


@pytest.mark.parametrize("page_dtype", FORMATS.values())
@pytest.mark.parametrize("label", ["llama", "qwen3", "gpt2", "gpt_oss"])
def test_pages_of_fewer_bits_are_those_of_the_twin(
    label: str, page_dtype: torch.dtype, tmp_path: Path
) -> None:
    """A number on the edge may be rounded the other way; no more than that."""
    make(label, tmp_path)
    prompt = torch.randint(2, 67, (23,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        wanted = _paged(tmp_path, prompt, torch.float32, page_dtype, torch.device("cpu"))
        found = _paged(tmp_path, prompt, torch.float32, page_dtype)
    assert (found - wanted).abs().max() <= 0.02 * wanted.abs().max()


@pytest.mark.parametrize("quantize", ["none", *WEIGHTS])
@pytest.mark.parametrize("kv_dtype", ["auto", *FORMATS])
def test_every_format_starts_trusted(quantize: str, kv_dtype: str) -> None:
    """The embedded model, as the server starts it: no kernel is replaced by its twin."""
    engine = Engine(quantize=quantize, kv_dtype=kv_dtype, device="cuda", pages=256)
    assert engine.info["warnings"] == []
    (event,) = engine.generate(["def add(a, b):\n    return"], max_tokens=4)
    assert event.error is None
    assert len(event.choices[0].tokens) == 4


def test_a_step_never_waits(tmp_path: Path) -> None:
    make("llama", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32, device=GPU)
    for graphs in (False, True):
        cache = Cache(decoder.config, ROWS * WIDTH, PAGE, device=GPU)
        runner = Runner(decoder, cache, ROWS, graphs)
        run(runner, 12)  # everything is compiled, recorded and allocated
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(runner, 12)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _paged(
    folder: Path,
    prompt: Tensor,
    dtype: torch.dtype,
    page_dtype: torch.dtype | None = None,
    device: torch.device = GPU,
) -> Tensor:
    ours = load(folder, dtype=dtype, device=device)
    table, pages = scattered_pages(1, 6)
    cache = Cache(ours.config, pages, PAGE, page_dtype or dtype, device)
    parts, at = [], 0
    for count in (16, 7):
        rows = rows_in_pages([count], [at + count], table)
        for name in ("positions", "starts", "lengths", "page_table", "slots"):
            setattr(rows, name, getattr(rows, name).to(device))
        hidden = ours(prompt[at : at + count].to(device), rows, cache)
        parts.append(ours.logits(hidden).cpu())
        at += count
    return torch.cat(parts)


@pytest.mark.parametrize("label", ["gpt2", "llama", "qwen3", "gemma2", "gpt_oss"])
def test_greedy_text_is_that_of_transformers(label: str, tmp_path: Path) -> None:
    theirs = make(label, tmp_path).to(GPU)
    prompt = torch.randint(2, 67, (9,), generator=torch.Generator().manual_seed(5))
    wanted = theirs.generate(
        prompt[None].to(GPU),
        attention_mask=torch.ones_like(prompt[None]).to(GPU),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ours = load(tmp_path, dtype=torch.float32, device=GPU)
    assert greedy(ours, prompt, 64) == wanted[0, len(prompt) :].tolist()


def test_a_graph_is_the_plain_step(tmp_path: Path) -> None:
    make("llama", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32, device=GPU)
    plain, replayed = (
        run(
            Runner(decoder, Cache(decoder.config, ROWS * WIDTH, PAGE, device=GPU), ROWS, graphs), 12
        )
        for graphs in (False, True)
    )
    for ours, theirs in zip(replayed, plain, strict=True):
        assert np.array_equal(ours, theirs)
