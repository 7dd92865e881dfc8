"""One engine in a process of its own: it writes its format and ends, or answers a line at a time.

    python -m benchmarks.peers.worker source SHAPE FOLDER
    python -m benchmarks.peers.worker write ENGINE SOURCE FOLDER FORMAT
    python -m benchmarks.peers.worker serve ENGINE FOLDER FORMAT THREADS VOCABULARY

Requests are the fields of a `Work` as JSON, on standard input; answers are JSON too. What engines
themselves print goes to standard error.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers import Beyond, Peer, Work, find, source
from benchmarks.processes import family, peak, seconds


def measure(peer: Peer, work: Work, vocabulary: int) -> dict[str, Any]:
    """Seconds, and the tokens for those who compare them."""
    prompts = work.prompts(vocabulary)
    wall, cpu = time.perf_counter(), computed()
    tokens = peer.generate(prompts, work.new, work.beams)
    spent = {"wall": time.perf_counter() - wall, "cpu": computed() - cpu}
    lengths = {len(line) for line in tokens}
    if lengths != {work.new} or len(tokens) != work.streams:
        raise RuntimeError(
            f"{len(tokens)} streams of {sorted(lengths)} tokens came, {work.streams} of {work.new} "
            "were asked for"
        )
    return spent | {"peak": sum(map(peak, family(os.getpid()))), "tokens": tokens}


def computed() -> float:
    """Seconds of CPU time, a server's processes with it."""
    return time.process_time() + sum(map(seconds, family(os.getpid())[1:]))


def serve(out: TextIO, engine: str, folder: str, form: str, threads: str, words: str) -> None:
    peer = find(engine).Peer(Path(folder), form, int(threads))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        try:
            answer = measure(peer, Work(**json.loads(line)), int(words))
        except Beyond as why:
            answer = {"error": str(why)}
        except Exception as error:  # one kind of work may be beyond an engine
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=out, flush=True)


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    verb, *rest = sys.argv[1:]
    if verb == "source":
        source.write(source.SHAPES[rest[0]], Path(rest[1]))
    elif verb == "write":
        find(rest[0]).write(Path(rest[1]), Path(rest[2]), rest[3])
    else:
        serve(out, *rest)


if __name__ == "__main__":
    main()
