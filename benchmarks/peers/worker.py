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

from benchmarks.peers import Peer, Work, find, source


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
    return spent | {"peak": peak(), "tokens": tokens}


def family(pid: int) -> list[int]:
    """A process and all that came of it: a server has several."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [pid, *(one for child in children for one in family(child))]


def computed() -> float:
    """Seconds of CPU time; of a server's processes, in steps of the kernel's clock."""
    others = family(os.getpid())[1:]
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in others]
    ticks = sum(int(stat[11]) + int(stat[12]) for stat in stats)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def peak() -> int:
    """Bytes of memory at the most; `getrusage` would count the parent's before this began."""
    texts = [Path(f"/proc/{pid}/status").read_text() for pid in family(os.getpid())]
    return sum(int(text.split("VmHWM:")[1].split()[0]) << 10 for text in texts)


def serve(out: TextIO, engine: str, folder: str, form: str, threads: str, words: str) -> None:
    peer = find(engine).Peer(Path(folder), form, int(threads))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        try:
            answer = measure(peer, Work(**json.loads(line)), int(words))
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
