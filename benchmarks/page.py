"""docs/performance.md, from the results that were kept in benchmarks/results/.

    python -m benchmarks.page [--check]

Nothing on that page is written by hand: a number without its machine, versions and command is
gossip. `--check` says whether the page is what this would write.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, _cell

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
ORDER = ("compare", "throughput", "latency", "beam", "front", "loading", "scheduler", "limits")
HEAD = """# Performance

Every table below is one run of one command, kept as JSON in `benchmarks/results/`;
`make performance` writes this page from them. Machines differ and neighbours disturb: compare
within a table, mind the spread, and run the command on your own machine before you decide.
"""
EMPTY = "No result has been kept yet: run a benchmark with `--save`.\n"
NOTES = {
    "compare": """Random weights of one shape, in each engine's own format; prompts of random ids,
forced to equal length. *Decode* is one stream, 128 tokens after a prompt of 128, without the time
of the first; *streams* are as many such requests at once, with their prompts; *prefill* is a prompt
of 1,024; *beam 4* is 64 tokens. *Ratio* is Kvist's speed over the other's, the median over rounds
in which all took their turn: above 1, Kvist is faster. *Of limit* is the share of what the memory's
bandwidth and the units' rate allow, both measured in the same run. The rate is torch's best of
square matrices: what does better than those is above 1. `kvist_http` is Kvist's own server, asked
over HTTP: its ratio is what HTTP costs, as far as the spread allows to tell. *Stored* is how the
source keeps its weights (float32 where nothing is said). In float32, Kvist leaves what is stored in
bfloat16 as it is, reads half as much, and computes float32's numbers; `llama_cpp BF16` reads as
much, but rounds what it multiplies to bfloat16.""",
    "throughput": """*Clients* ask again when they are answered; the other loads come by themselves,
at a share of the requests a second that the fastest clients got. *Own* prompts have nothing in
common, *shared* ones their first half, with the prefix cache on. *First* is the wait for the first
token, *next* a request's mean time from token to token: percentiles over requests. *Goodput* counts
the requests whose two waits were within the targets below. *Cpu* is the engine's, or the whole
server's. *Of limit* is the share of what the memory's bandwidth and the units' rate allow; a small
model's weights stay in the processor's cache, which is faster.""",
    "beam": """One beam search of so many beams, after a prompt, against as many greedy streams
(*ratio*: beam over greedy, of time) and against transformers' own search of the same network
(*times*: how often as fast). *Selection* is what a step's search takes on the host.""",
    "front": """The real server with a network that costs nothing and says, in each token, when the
engine handed it over and when the front had it: *late* is how long it was on its way to a client
that reads it, mean, median and 99th percentile, and *http* the mean part of it after that. *Cpu* is
the front process's. A step of 0 goes as fast as it can.""",
    "loading": """A checkpoint of noise in bfloat16, read and loaded in turns in one process from a
warm page cache. *× reading* is against reading the same bytes into memory that stays; *start* is
all that a server does before its first step, with the most memory above the weights' own.""",
    "soak": """What the whole server promises, each by a load of its own; *met*: the number that was
promised is reached. *G3*: 500 clients a second hang up, *hasty* ones when their answer begins,
*leavers* at any moment within 0.2 s. Others' 99th percentile beside hasty ones is judged by theirs
alone. Leavers are fifty streams at any time, a load whoever leaves: beside them it is judged by
theirs beside as many who get as many tokens and stay, and told over theirs alone. Older rows have
no hasty clients, and were judged by stayers alone. What is a ratio is a median of turns, with the
least and the most: G3's of five seconds since fe32908, of twenty before; G7's, the others' median
over theirs alone, has turns since ae75457. All of this shares two cores with its clients, and a
processor with other machines, whose doings decide between such runs as these.""",
    "latency": """Rows that ask at once. *First* is the wait for the first token, all prompts before
it included; *next* the time from token to token while every row decodes: percentiles over requests
and tokens. *Of bandwidth* is what a step reads (weights, keys and values), *of products* what the
prompts multiply, as shares of what was measured in the same run.""",
}


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """In a fixed order, whatever the files are called; a chapter a benchmark."""
    parts = [HEAD]
    for name, found in groupby(sorted(results, key=_rank), lambda result: result["benchmark"]):
        parts += [f"## {name.replace('_', ' ').capitalize()}\n"]
        parts += [f"{NOTES[name]}\n"] if name in NOTES else []
        parts += [section(result) for result in found]
    return "\n".join(parts if results else [HEAD, EMPTY])


def _rank(result: Mapping[str, Any]) -> tuple[int, str, str, str]:
    name = result["benchmark"]
    place = ORDER.index(name) if name in ORDER else len(ORDER)
    return place, name, _title(result), result["device"]


def section(result: Mapping[str, Any]) -> str:
    lines = [f"### {_title(result)}, at {result['commit']}", "", conditions(result), ""]
    if result.get("disturbed"):
        lines += ["**This run was disturbed**: its spread is above 15 %.", ""]
    lines += [*ceilings(result), *picture(result), *tables(result["rows"])]
    lines += [f"- {sentence}" for sentence in result.get("said", ())]
    lines += missing(result)
    return "\n".join(lines).rstrip() + "\n"


def _title(result: Mapping[str, Any]) -> str:
    stored = [f"stored in {result['stored']}"] if "stored" in result else []
    of = [result.get("shape"), *stored, *result.get("precisions", ()), result.get("label")]
    model = result.get("about", {}).get("model")
    return ", ".join(filter(None, of)) or (f"model {model}" if model else result["device"])


def picture(result: Mapping[str, Any]) -> Iterator[str]:
    if "picture" in result:
        yield f"![{_title(result)}](../benchmarks/results/{result['picture']})\n"


def conditions(result: Mapping[str, Any]) -> str:
    versions = {"Python": result["python"], "torch": result["torch"]} | result.get("versions", {})
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{result['device']}, {result['cores']} cores, load {result['load']:.1f}; {told}; "
        f"`python {result['command']}`"
    )


def ceilings(result: Mapping[str, Any]) -> Iterator[str]:
    """What the machine can do, of each number of threads if there are several."""
    found = result.get("limits")
    if not found:
        return
    for threads, limit in found.items() if "read" not in found else [("", found)]:
        rates = [f"{limit['read'] / 1e9:.1f} GB/s read", f"{limit['float32'] / 1e9:,.0f} GFLOP/s"]
        if limit.get("int8"):
            rates.append(f"{limit['int8'] / 1e9:,.0f} int8 GOP/s")
        count = f"With {threads} thread{'s' * (threads != '1')}: " if threads else ""
        yield f"Limits measured in this run. {count}{', '.join(rates)}.\n"


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The best of each column needs no bold: rows stand as they were measured."""
    names = [name for name in rows[0] if any(row.get(name) not in (None, "") for row in rows)]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "|".join(" --- " if _words(rows, name) else " ---: " for name in names) + "|"
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(name)).replace("|", "\\|") for name in names) + " |"
    yield ""


def _words(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(isinstance(row.get(name), str) for row in rows)


def missing(result: Mapping[str, Any]) -> Iterator[str]:
    for name, why in result.get("missing", {}).items():
        yield f"- {name}: {why}"


def kept(folder: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    text = page(kept())
    if given.check:
        same = PAGE.exists() and PAGE.read_text() == text
        sys.exit(None if same else "docs/performance.md is not what `make performance` writes")
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
