"""The decode step that CUDA replays, rehearsed: padding and fixed buffers change nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.backend import HAS_TRITON, Device, pretend
from model.batch import LAST_SAMPLE, Batch, Seat
from model.cache import Cache
from model.graphs import RUNGS
from model.runner import Runner
from model.sampling import Sampling
from model.weights import load
from tests.model.families import make

NONE = np.zeros(0, np.int32)
PAGE, WIDTH, ROWS = 4, 16, 5  # padded to 8


def batch(tokens: list[list[int]], length: int, seats: list[Seat]) -> Batch:
    counts = [len(one) for one in tokens]
    ends = np.cumsum(counts).astype(np.int32)
    where = np.arange(len(tokens), dtype=np.int32)
    table = np.random.default_rng(0).permutation(ROWS * WIDTH).astype(np.int32).reshape(ROWS, -1)
    return Batch(
        tokens=np.concatenate([np.array(one, np.int32) for one in tokens]),
        starts=np.concatenate([[0], ends]).astype(np.int32),
        lengths=np.full(len(tokens), length, np.int32),
        page_table=table[: len(tokens), : -(-length // PAGE)],
        seats=where,
        sample_at=ends - 1,
        sample_seat=where,
        score_at=NONE,
        score_token=NONE,
        beam_at=NONE,
        beam_seat=NONE,
        top=2,
        taken=seats,
    )


def run(runner: Runner, steps: int) -> list[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    """Five rows: greedy ones beside drawn ones; the last two end early. [steps][rows]"""
    chance = np.random.default_rng(1)
    prompts = [chance.integers(2, 67, 9).tolist() for _ in range(ROWS)]
    seats = [
        Seat(i, Sampling(temperature=i % 3, top_k=7 * (i % 2), seed=i), 0, [], [], 9)
        for i in range(ROWS)
    ]
    found = [runner.launch(batch(prompts, 9, seats))().tokens]
    for step in range(1, steps):
        alive = ROWS if step < 4 else ROWS - 2
        output = runner.launch(batch([[LAST_SAMPLE]] * alive, 9 + step, []))()
        found.append(np.concatenate([output.tokens, output.top_tokens.ravel()]))
    return found


def test_a_padded_replay_is_the_plain_step(tmp_path: Path) -> None:
    make("llama", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    runners = [
        Runner(decoder, Cache(decoder.config, ROWS * WIDTH, PAGE), ROWS, graphs=rehearse)
        for rehearse in (False, True)
    ]
    plain, replayed = (run(runner, 12) for runner in runners)
    assert runners[1].graphs is not None
    assert set(runners[1].graphs.recorded) == {(8, 512, False), (4, 512, False)}
    for ours, theirs in zip(replayed, plain, strict=True):
        assert np.array_equal(ours, theirs)
    assert torch.allclose(runners[0].cache.pages, runners[1].cache.pages, atol=1e-5)


def test_rows_that_look_back_or_are_masked_are_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("llama", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    runner = Runner(decoder, Cache(decoder.config, ROWS * WIDTH, PAGE), 1, graphs=True)
    penalised = Seat(0, Sampling(temperature=0, repetition_penalty=1.5), 0, [5] * 3, [], 3)
    runner.launch(batch([[5] * 3], 3, [penalised]))()
    runner.launch(batch([[LAST_SAMPLE]], 4, []))()
    assert runner.graphs is not None
    assert not runner.graphs.recorded
    runner.launch(batch([[5]], 1, [Seat(0, Sampling(), 0, [], [], 1)]))()
    assert len(runner.graphs.recorded) == 1
    masks, mask_at = np.full((1, 3), 1 << 9, np.int32), np.zeros(1, np.int32)
    masked = replace(batch([[LAST_SAMPLE]], 2, []), masks=masks, mask_at=mask_at)
    monkeypatch.setattr(runner.graphs, "run", None)
    assert runner.launch(masked)().tokens.tolist() == [9]


def test_a_row_that_masks_leave_nothing_is_bad_and_no_other(tmp_path: Path) -> None:
    make("llama", tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    runner = Runner(decoder, Cache(decoder.config, ROWS * WIDTH, PAGE), 3)
    empty = Sampling(allowed=(4,), bad_words=((4,),))
    seats = [Seat(i, empty if i == 1 else Sampling(), 0, [], [], 3) for i in range(3)]
    found = runner.launch(batch([[5] * 3] * 3, 3, seats))()
    assert found.bad.tolist() == [0, 1, 0]
    assert (found.tokens >= 0).tolist() == [True, False, True]


class NoWaiting(TorchDispatchMode):
    """Raises where a GPU would have to answer before the host can go on."""

    WAITS = (  # as inference mode names them
        *("item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "bincount"),
        *("_unique2", "unique_dim", "repeat_interleave", "_local_scalar_dense", "allclose"),
    )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.__name__.partition(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            kinds = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in kinds, "to index by truths is to wait for their number"
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "wait",
    [
        torch.Tensor.item,
        bool,
        torch.nonzero,
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x, as_tuple=True),
    ],
)
def test_what_waits_is_seen(wait: Callable[[torch.Tensor], object]) -> None:
    waiting = NoWaiting()  # type: ignore[no-untyped-call, unused-ignore]
    with torch.inference_mode(), waiting, pytest.raises(AssertionError, match="wait"):
        wait(torch.ones(1))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
@pytest.mark.parametrize("label", ["llama", "gpt_oss", "bloom"])
def test_a_step_never_waits_for_the_device(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose kernels are named and not run: prompts that are scored, draws with all
    that looks back, beams, copies, and a graph."""
    make(label, tmp_path)
    decoder = load(tmp_path, dtype=torch.float32)
    runner = Runner(decoder, Cache(decoder.config, ROWS * WIDTH, PAGE), ROWS, graphs=True)
    looks = Sampling(repetition_penalty=1.5, logit_bias={3: 1.0}, bad_words=((7,),))
    seats = [Seat(i, looks if i else Sampling(), 0, [5] * 3, [], 3) for i in range(3)]
    all_rows, copies = np.arange(3, dtype=np.int32), np.array([[0, 1, 2]], np.int32)
    prompts = batch([[5] * 3] * 3, 3, seats)
    prompts.score_at, prompts.score_token = all_rows, all_rows
    beams = replace(batch([[5]] * 3, 5, []), beam_at=all_rows, beam_seat=all_rows, beam_width=4)
    beams = replace(beams, sample_at=NONE, sample_seat=NONE)
    masks: dict[str, Any] = {"mask_at": all_rows[1:], "masks": np.full((2, 3), 0b1011, np.int32)}
    plain = [Seat(i, Sampling(top_k=3), 0, [], [], 6) for i in range(3)]
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    waiting = NoWaiting()  # type: ignore[no-untyped-call, unused-ignore]
    with pretend(Device("an H200", 90, 132)), waiting:
        for step in (
            replace(prompts, **masks),
            replace(batch([[6]] * 3, 4, []), copies=copies, logprobs=False),
            replace(beams, **masks),
            replace(batch([[5]] * 3, 6, plain), logprobs=False),
        ):
            runner.launch(step)()
    assert runner.graphs is not None
    assert len(runner.graphs.recorded) == 1


def test_rungs_rise() -> None:
    assert list(RUNGS) == sorted(set(RUNGS))
