"""Do they compute the same? Greedy tokens in float32, against transformers'."""

from argparse import Namespace
from pathlib import Path

from tqdm import tqdm

from benchmarks import harness
from benchmarks.peers import PEERS, Work
from benchmarks.peers.remote import Failed, Remote, convert, source
from benchmarks.peers.source import SHAPES

WORK = Work(streams=8, prompt=64, new=16)
BEAM = Work(streams=1, prompt=64, new=16, beams=4)
ENOUGH = 0.75  # of the streams to the last token: noise has near ties, a wrong sum agrees nowhere
JUDGE = "transformers"


def check(given: Namespace, work: Path) -> int:
    """A row an engine; the exit status."""
    here = source(given.shape, work)
    right = said(JUDGE, here, work, given)
    rows: list[harness.Row] = []
    for engine in tqdm(given.engines, disable=None):
        try:
            if not PEERS[engine].tells:
                raise Failed("its tokens are not told over HTTP")
            found = said(engine, here, work, given)
            equal = sum(a == b for a, b in zip(right[WORK], found[WORK])) / WORK.streams
            beam = found.get(BEAM) == right[BEAM] if BEAM in found else None
            rows.append({"engine": engine, "equal": equal, "beam 4 equal": beam, "note": ""})
        except Failed as why:
            rows.append({"engine": engine, "equal": None, "beam 4 equal": None, "note": str(why)})
    harness.finish("check", rows, given, shape=given.shape, judge=JUDGE, enough=ENOUGH)
    return int(any(row["equal"] is not None and row["equal"] < ENOUGH for row in rows))


def said(engine: str, here: Path, work: Path, given: Namespace) -> dict[Work, list[list[int]]]:
    """The tokens of one engine, with beams if it has them."""
    form = PEERS[engine].forms["float32"][0]
    folder = convert(engine, here, form, work)
    remote = Remote(engine, form, folder, given.threads[0], SHAPES[given.shape]["vocabulary"])
    try:
        found = {WORK: remote.ask(WORK, given.patience)["tokens"]}
        try:
            found[BEAM] = remote.ask(BEAM, given.patience)["tokens"]
        except Failed as why:
            if not remote.alive:
                raise
            print(f"{engine}, beam 4: {why}")
        return found
    finally:
        remote.close()
