"""Every family against transformers: logits, cached decode, batches, greedy continuations."""

from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from kernels.backend import KERNELS
from kernels.build import NotHere
from model.batch import LAST_SAMPLE, Batch, Ints, Seat
from model.cache import Cache, Rows
from model.decoder import Decoder
from model.families import FAMILIES, family_of
from model.pack import pack_decoder
from model.readings import UnsupportedModelError
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from tests.model.families import CASES, make

LENGTHS = (23, 9, 14)  # tokens of the prompts; longer than the windows
PAGE = 4
NONE = np.zeros(0, np.int32)


class Pair(NamedTuple):
    theirs: Any
    ours: Decoder
    prompts: list[Tensor]


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = make(request.param, folder)
    chance = torch.Generator().manual_seed(5)
    prompts = [torch.randint(2, 67, (n,), generator=chance) for n in LENGTHS]
    return Pair(theirs, load(folder, dtype=torch.float32), prompts)


def reference(pair: Pair, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.theirs(prompt[None]).logits[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def rows_in_pages(counts: list[int], lengths: list[int], table: Tensor) -> Rows:
    """Rows whose last `counts` of `lengths` tokens are this step's."""
    spans = [torch.arange(n - c, n) for c, n in zip(counts, lengths, strict=True)]
    slots = [
        row[span // PAGE].long() * PAGE + span % PAGE
        for row, span in zip(table, spans, strict=True)
    ]
    edges = np.cumsum([0, *counts])
    return Rows(
        positions=torch.cat(spans),
        starts=torch.tensor(edges, dtype=torch.int32),
        longest_query=max(counts),
        longest_context=max(lengths),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        page_table=table,
        slots=torch.cat(slots),
    )


def scattered_pages(rows: int, width: int) -> tuple[Tensor, int]:
    """[rows, width] of pages in no order at all."""
    order = torch.randperm(rows * width, generator=torch.Generator().manual_seed(3))
    return order.int().view(rows, width), rows * width


def test_prefill(pair: Pair) -> None:
    prompt = pair.prompts[0]
    with torch.no_grad():
        ours = pair.ours.logits(pair.ours(prompt, Rows.alone([len(prompt)])))
    assert_close(ours, reference(pair, prompt))


def test_cached_decode_of_unequal_rows(pair: Pair) -> None:
    """A step of three prefills that stop early, then steps of one token a row."""
    prompts, decode = pair.prompts, 4
    table, pages = scattered_pages(3, -(-max(map(len, prompts)) // PAGE))
    cache = Cache(pair.ours.config, pages, PAGE)
    counts = [len(prompt) - decode for prompt in prompts]
    lengths = list(counts)
    found: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for _ in range(decode + 1):
            tokens = [p[n - c : n] for p, c, n in zip(prompts, counts, lengths, strict=True)]
            rows = rows_in_pages(counts, lengths, table)
            logits = pair.ours.logits(pair.ours(torch.cat(tokens), rows, cache))
            for mine, part in zip(found, logits.split(counts), strict=True):
                mine.append(part)
            counts, lengths = [1, 1, 1], [n + 1 for n in lengths]
    for prompt, parts in zip(prompts, found, strict=True):
        assert_close(torch.cat(parts), reference(pair, prompt))


def ints(*values: int) -> Ints:
    return np.array(values, np.int32)


def greedy(decoder: Decoder, prompt: Tensor, count: int) -> list[int]:
    """Through the runner, each token fed from where it was sampled."""
    total = len(prompt) + count
    table, pages = scattered_pages(1, -(-total // PAGE))
    device = decoder.embed.get_parameter("weight").device
    runner = Runner(decoder, Cache(decoder.config, pages, PAGE, device=device), seats=2)
    seat = Seat(1, Sampling(temperature=0), 0, prompt.tolist(), [])
    tokens = prompt.numpy().astype(np.int32)
    out: list[int] = []
    for length in range(len(prompt), total):
        batch = Batch(
            tokens=tokens,
            starts=ints(0, len(tokens)),
            lengths=ints(length),
            page_table=table.numpy(),
            seats=ints(1),
            sample_at=ints(len(tokens) - 1),
            sample_seat=ints(1),
            score_at=NONE,
            score_token=NONE,
            beam_at=NONE,
            beam_seat=NONE,
            taken=[seat] if not out else [],
        )
        out.append(int(runner.launch(batch)().tokens[0]))
        tokens = ints(LAST_SAMPLE)
    return out


def test_greedy_continuation(pair: Pair) -> None:
    prompt, count = pair.prompts[1], 64
    theirs = pair.theirs.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert greedy(pair.ours, prompt, count) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("context", [64, 256])
def test_longrope_goes_by_the_context_served(context: int, tmp_path: Path) -> None:
    """transformers goes by the text, and forgets its cache when the text grows past 64."""
    long = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i / 2 for i in range(8)],
    }
    theirs = make("phi3", tmp_path, rope_parameters=long, original_max_position_embeddings=64)
    ours = load(tmp_path, dtype=torch.float32, context=context)
    prompt = torch.randint(2, 67, (context,))
    with torch.no_grad():
        logits = ours.logits(ours(prompt, Rows.alone([context])))
        assert_close(logits, theirs(prompt[None]).logits[0])


def test_dynamic_rope_stretches_to_the_context_served(tmp_path: Path) -> None:
    theirs = make("llama-dynamic", tmp_path)
    ours = load(tmp_path, dtype=torch.float32, context=400)
    prompt = torch.randint(2, 67, (400,))
    with torch.no_grad():
        logits = ours.logits(ours(prompt, Rows.alone([400])))
        assert_close(logits, theirs(prompt[None]).logits[0])


IN_ONE_CALL = {"llama-group-of-7", "gpt2", "qwen3", "mistral", "gemma2", "gemma3"}


@pytest.mark.parametrize(
    "label",
    [*sorted(IN_ONE_CALL), "gptj", "opt-post-norm", "gpt_oss"],
)
def test_packed_for_the_cpu(label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native products, attention and norms: the same logits, and the same bits for any chunk."""
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "native", kernel.native)  # undone afterwards
    theirs = make(label, tmp_path)
    ours = load(tmp_path, dtype=torch.float32)
    try:
        pack_decoder(ours)
    except NotHere as why:
        pytest.skip(f"no native kernels here: {why}")
    prompt = torch.randint(2, 67, (23,), generator=torch.Generator().manual_seed(1))
    table, pages = scattered_pages(1, 6)

    def logits(*chunks: int) -> Tensor:
        cache, parts, at = Cache(ours.config, pages, PAGE), [], 0
        for count in chunks:
            rows = rows_in_pages([count], [at + count], table)
            parts.append(ours.logits(ours(prompt[at : at + count], rows, cache)))
            at += count
        return torch.cat(parts)

    with torch.inference_mode():
        whole = logits(23)
        assert_close(whole, theirs(prompt[None]).logits[0])
        if not ours.config.experts and ours.config.activation in ("silu", "gelu_tanh"):
            assert torch.equal(logits(1, 4, 17, 1), whole)
        assert (ours.whole is not None) == (label in IN_ONE_CALL)
        if ours.whole:
            forbid_twins(monkeypatch)
            rows = rows_in_pages([23], [23], table)
            rows.wanted = torch.tensor([0, 7, 22])
            some = ours(prompt, rows, Cache(ours.config, pages, PAGE))[rows.wanted]
            assert torch.equal(ours.logits(some), whole[rows.wanted])
        ours.whole = None  # layer by layer, the same functions run
        assert torch.equal(logits(23), whole)


@pytest.mark.parametrize(
    ("label", "dtype"),
    [
        *((label, torch.bfloat16) for label in sorted(CASES)),
        *((label, torch.float16) for label in ("llama", "gpt2", "gemma2")),
    ],
)
def test_weights_kept_in_16_bits_change_nothing(
    label: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 of 16 bits: what weights made wide give, bit for bit, and transformers' logits."""
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "native", kernel.native)
    make(label, tmp_path).to(dtype).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    kept, wide = (load(tmp_path, dtype=torch.float32, keep=keep) for keep in (True, False))
    assert kept.embed.weight.dtype == dtype
    assert wide.embed.weight.dtype == torch.float32
    prompt, found = torch.arange(2, 25), []
    for ours in kept, wide:
        out = ours.get_submodule("layers.0.attention.out")
        assert out.weight.dtype == ours.embed.weight.dtype
        try:
            pack_decoder(ours)
        except NotHere as why:
            pytest.skip(f"no native kernels here: {why}")
        with torch.inference_mode():
            found.append(ours.logits(ours(prompt, Rows.alone([23]))))
    assert torch.equal(*found)
    with torch.no_grad():
        assert_close(found[0], theirs(prompt[None]).logits[0])


def forbid_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(*_: object, **__: object) -> NoReturn:
        raise AssertionError("torch's way was taken where there is a native one")

    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "twin", twin)


def test_every_family_has_a_row() -> None:
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"MambaForCausalLM.*supported are bloom.*qwen3"
    ):
        family_of({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})


def test_an_option_that_changes_the_network_is_refused() -> None:
    config = {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    _, family = family_of(config)
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx=True"):
        family.config(config)


def test_what_is_watched_is_what_passes(tmp_path: Path) -> None:
    """Every named place is seen, and what `see` returns is what goes on."""
    theirs = make("llama", tmp_path)
    ours = load(tmp_path, dtype=torch.float32)
    prompt = torch.arange(2, 20)
    seen: dict[tuple[str, int], Tensor] = {}

    def watch(place: str, layer: int, value: Tensor) -> Tensor:
        seen[place, layer] = value
        return value * 0 if (place, layer) == ("fed", 1) else value

    with torch.no_grad():
        changed = ours(prompt, Rows.alone([len(prompt)]), watch=watch)
        plain = ours(prompt, Rows.alone([len(prompt)]))
        hidden = theirs(prompt[None], output_hidden_states=True).hidden_states
    assert_close(seen["embedding", -1], hidden[0][0])
    assert_close(seen["residual", 0], hidden[1][0])
    assert {place for place, _ in seen} == {
        "embedding", "query", "key", "value", "attention", "attended",
        "neurons", "fed", "residual", "normed",
    }  # fmt: skip
    assert (changed - plain).abs().max() > 0.1
