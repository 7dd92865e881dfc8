"""What the scheduler and its bookkeeping cost, with a model that costs nothing.

    python -m benchmarks.scheduler [--rows 256] [--steps 400]

For 1 to 4,096 requests waiting behind a full batch: CPU time a token of `schedule` + `advance`,
everything from the page table to the events, and the tokens/s that this alone would allow. Ends in
one JSON line; `flat` is the cost a token at the longest queue over that at the shortest.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

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
    return {"waiting": waiting, "us": spent / made * 1e6, "tokens_per_s": made / spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ahead", type=int, default=1)
    asked = parser.parse_args()
    print(f"{asked.rows} rows, {asked.steps} steps, {asked.ahead} ahead")
    print(f"{'waiting':>8} {'µs/token':>9} {'tokens/s':>10}")
    table = []
    queues = (1, 16, 256, 1024, 4096)
    rounds = [[measure(asked.rows, w, asked.steps, asked.ahead) for w in queues] for _ in range(3)]
    for many in zip(*rounds, strict=True):
        row = min(many, key=lambda one: one["us"])  # neighbours on the machine only ever add
        table.append(row)
        waiting = row["waiting"]
        print(f"{waiting:8} {row['us']:9.2f} {row['tokens_per_s']:10,.0f}")
    worst = max(row["us"] for row in table)
    flat = table[-1]["us"] / table[0]["us"]
    said = {"benchmark": "scheduler", "rows": asked.rows, "goal_us": GOAL, "flat": round(flat, 3)}
    print(json.dumps({**said, "us_per_token": round(worst, 2), "share": round(worst / GOAL, 3)}))


if __name__ == "__main__":
    main()
