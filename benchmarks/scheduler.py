"""What the scheduler and its bookkeeping cost, with a model that costs nothing.

    python -m benchmarks.scheduler [--rows 256] [--steps 400]

For 1 to 4,096 requests waiting behind a full batch: CPU time a token of `schedule` + `advance`,
everything from the page table to the events, and the tokens/s that this alone would allow; the best
of three rounds. `flat` is the cost a token at the longest queue over that at the shortest.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from tqdm import tqdm

from benchmarks import harness
from model.batch import Batch, Output
from model.sampling import Sampling
from server.engine.admission import Options
from server.engine.engine import Engine
from server.engine.pages import Pages
from server.engine.request import Request
from server.settle import settle

GOAL = 15.0  # µs a token at 256 rows


class Nothing:
    """A network that answers at once, and always the same."""

    def launch(self, batch: Batch) -> Callable[[], Output]:
        samples, rows = len(batch.sample_at), len(batch.lengths)
        ints, floats = np.zeros((samples, 0), np.int32), np.zeros((samples, 0), np.float32)
        output = Output(
            tokens=np.full(samples, 7, np.int32),
            logprobs=np.zeros(samples, np.float32),
            ranks=np.ones(samples, np.int32),
            top_tokens=ints,
            top_logprobs=floats,
            score_logprobs=floats[:0, 0:],
            score_ranks=ints[:0],
            score_top_tokens=ints[:0],
            score_top_logprobs=floats[:0],
            beam_tokens=ints[:0],
            beam_logprobs=floats[:0],
            bad=np.zeros(rows, np.int32),
        )
        return lambda: output


def measure(rows: int, waiting: int, steps: int, ahead: int) -> dict[str, float]:
    """Steady decode of `rows` rows of 100 to 2,000 tokens, `waiting` requests behind them."""
    pages = Pages(rows * 256, 16)
    options = Options(seats=rows, budget=8192, queue=8192, queue_tokens=1 << 40, ahead=ahead)
    engine = Engine(Nothing(), pages, options)
    for i in range(rows + waiting):
        prompt = [(i * 31 + j) % 50_000 for j in range(100 + i * 37 % 1900)]
        sampling = Sampling(seed=i)
        engine.submit(Request(id=str(i), prompt=prompt, max_tokens=2000, sampling=sampling))
    while engine.stats.running < rows or engine.stats.output_tokens < 2 * rows:
        engine.step()
    settle()
    before, began = engine.stats.output_tokens, time.process_time()
    for _ in range(steps):
        engine.step()
    spent, made = time.process_time() - began, engine.stats.output_tokens - before
    return {"waiting": waiting, "µs/token": spent / made * 1e6, "tok/s": made / spent}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ahead", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep the result")
    asked = parser.parse_args()
    queues = (1, 16, 256, 1024, 4096)
    turns = tqdm([waiting for _ in range(3) for waiting in queues], disable=None, leave=False)
    found = [measure(asked.rows, waiting, asked.steps, asked.ahead) for waiting in turns]
    rows = [  # neighbours on the machine only ever add
        min((one for one in found if one["waiting"] == waiting), key=lambda one: one["µs/token"])
        for waiting in queues
    ]
    worst = max(row["µs/token"] for row in rows)
    flat = rows[-1]["µs/token"] / rows[0]["µs/token"]
    said = [
        f"{asked.rows} rows, {asked.steps} steps, {asked.ahead} ahead: {worst:.1f} µs a token or "
        f"less, {worst / GOAL:.2f} of the goal; the longest queue costs {flat:.2f} of the shortest."
    ]
    harness.finish("scheduler", rows, asked, goal_us=GOAL, flat=round(flat, 3), said=said)


if __name__ == "__main__":
    main()
