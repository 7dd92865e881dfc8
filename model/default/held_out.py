"""A fixed sample of the held-out files, and the prompts cut from it.

Which files are held out is the same everywhere, but their text changes with the Python version, so
what tests and the card measure is kept here in `held_out.json`. A prompt is an excerpt up to a
line at which a statement begins, and then, in its place and at its indentation, an opening that
everybody types.
"""

import ast
import codeop
import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.default.corpus import LICENCE, Source, corpus
from model.default.export import HERE

PATH = HERE / "held_out.json"
EXCERPT = 3_000  # characters, about 800 tokens: a prompt and its answer fit the context
INCOMPLETE: int = vars(codeop)["PyCF_ALLOW_INCOMPLETE_INPUT"]  # a flag of compile()
LEAST = 400  # shorter files say little
EACH = 50  # prompts an opening
# What is typed, and what stood in its place.
OPENINGS = {
    "import os, ": re.compile(r"(import|from|class|def|[A-Za-z_]+ =)\b"),
    "class ": re.compile(r"(class|def|@|[A-Za-z_]+ =)"),
    "def __init__(self": re.compile(r"    (def|@)\b"),
    "for i in range(": re.compile(r" +(for|if|while|return|try|with|[a-z_.]+ =)\b"),
}


class Prompt(NamedTuple):
    file: str
    opening: str
    text: str


def load() -> dict[str, Any]:
    """{"python", "licence", "sha256", "excerpts": {file: text}}, refused if it was changed."""
    document: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    if (found := digest(document["excerpts"])) != document["sha256"]:
        raise ValueError(f"{PATH} hashes to {found}, and says {document['sha256']}")
    return document


def digest(excerpts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(excerpts, sort_keys=True).encode()).hexdigest()


def excerpt(source: Source) -> str:
    """Whole lines from the beginning of a top-level statement that the file's name chooses."""
    lines = source.text.splitlines(keepends=True)
    starts = [statement.lineno - 1 for statement in ast.parse(source.text).body]
    roomy = [s for s in starts if sum(map(len, lines[s:])) >= EXCERPT] or starts[:1]
    begin = roomy[_draw(source.name) % len(roomy)]
    end = begin
    while end < len(lines) and sum(map(len, lines[begin : end + 1])) <= EXCERPT:
        end += 1
    return "".join(lines[begin:end])


def _draw(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16])


def prompts(excerpts: dict[str, str]) -> list[Prompt]:
    """`EACH` of every opening, those with the smallest hashes."""
    chosen: list[Prompt] = []
    for opening, place in OPENINGS.items():
        found = [p for file, text in excerpts.items() for p in _places(file, text, opening, place)]
        chosen += sorted(found, key=lambda prompt: _draw(prompt.text))[:EACH]
    return chosen


def _places(file: str, text: str, opening: str, place: re.Pattern[str]) -> Iterator[Prompt]:
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        before = "".join(lines[:number])
        indentation = line[: len(line) - len(line.lstrip())]
        if place.match(line) and number and parses(f"{before}{indentation}pass\n"):
            yield Prompt(file, opening, before + indentation + opening)


# ── does it parse? ────────────────────────────────────────────────────────────────────────────


def parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library itself writes "\d" here and there
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return False
    return True


def verdict(prompt: str, completion: str) -> str:
    """ "parses", "unfinished" or "wrong".

    The line that the token limit cut short is dropped. "parses": what then stands there is
    Python up to its last full statement, the statement that the prompt opened is among the full
    ones, and what follows the last one could still become a statement. "unfinished": the opened
    statement could still become one, but is not full yet. All else is wrong.
    """
    lines = (prompt + completion).splitlines(keepends=True)
    lines = lines if lines[-1].endswith("\n") else lines[:-1]
    opened = len(prompt.splitlines())
    full = next((n for n in range(len(lines), opened - 1, -1) if parses("".join(lines[:n]))), 0)
    if not _could_go_on("".join(lines)):
        return "wrong"
    return "parses" if full else "unfinished"


def _could_go_on(text: str) -> bool:
    """Python so far: whole, or only its end is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(text, "<completion>", "exec", ast.PyCF_ONLY_AST | INCOMPLETE)
        except SyntaxError as error:
            return "incomplete input" in str(error)
        except (ValueError, RecursionError):
            return False
    return True


def main() -> None:
    sources = corpus().held_out
    excerpts = {s.name: excerpt(s) for s in sources if len(s.text) >= LEAST}
    document = {
        "python": sys.version.split()[0],
        "licence": LICENCE,
        "sha256": digest(excerpts),
        "excerpts": excerpts,
    }
    PATH.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(excerpts)} excerpts, {len(prompts(excerpts))} prompts")


if __name__ == "__main__":
    main()
