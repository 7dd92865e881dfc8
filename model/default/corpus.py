"""What the embedded model learns from: the standard library of the Python that runs this file.

Everything is found through `sysconfig`, nothing is fetched. The split is by file and a function of
the file's name alone, so it is the same on every machine. A held-out file must be its own work:
one that shares many lines with the rest of the library (tables, forks, copies) is no fair question,
so it goes to the training side, and the test module that quotes a held-out module goes nowhere.
"""

import hashlib
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.default.exercises import exercises

LICENCE = "Python Software Foundation License Version 2 (PSF-2.0), © Python Software Foundation"
HELD_OUT_SHARE = 12  # one file in so many
SMALLEST_HELD_OUT = 1_500  # bytes; less is an empty __init__ and measures nothing
TELLING_LINE = 30  # characters from which a repeated line is no coincidence
FOREIGN = {"site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TESTS = {"test", "tests", "idle_test"}
TABLES = {"pydoc_data", "encodings", "lib2to3"}  # generated text, code pages, a frozen fork
EXERCISES_SEED = 6


@dataclass(frozen=True)
class Source:
    """One text of the corpus."""

    name: str  # path inside the standard library, with slashes
    text: str

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("/"))

    @property
    def lines(self) -> list[str]:
        """What a copy of this file would share with it."""
        lines = (line.strip() for line in self.text.splitlines())
        return [line for line in lines if len(line) >= TELLING_LINE]


@dataclass(frozen=True)
class Corpus:
    library: list[Source]  # trained on
    side: list[Source]  # tests and tables: trained on, but seldom
    exercises: list[Source]
    held_out: list[Source]  # never trained on
    dropped: list[str]  # copies of other files, and tests that quote held-out modules

    def record(self) -> dict[str, Any]:
        """What was read, so that another machine can tell whether it reads the same."""
        groups = {
            name: _account(getattr(self, name))
            for name in ("library", "side", "exercises", "held_out")
        }
        return {
            "python": sys.version.split()[0],
            "licence": LICENCE,
            **groups,
            "dropped": len(self.dropped),
            "held_out_files": {source.name: digest([source]) for source in self.held_out},
        }


def digest(sources: Iterable[Source]) -> str:
    return hashlib.sha256("\0".join(source.text for source in sources).encode()).hexdigest()


def _account(sources: list[Source]) -> dict[str, Any]:
    size = sum(len(source.text.encode()) for source in sources)
    return {"files": len(sources), "bytes": size, "sha256": digest(sources)}


def read_library(root: Path | None = None) -> list[Source]:
    """Every module of the standard library, by name. Files in no encoding are somebody's test."""
    root = root or Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if FOREIGN.isdisjoint(name.parts):
            try:
                with tokenize.open(path) as file:
                    sources.append(Source(name.as_posix(), file.read()))
            except (SyntaxError, UnicodeDecodeError):
                continue
    return sources


def corpus(root: Path | None = None) -> Corpus:
    sources = read_library(root)
    side = [s for s in sources if (TESTS | TABLES) & set(s.parts)]
    code = [s for s in sources if not (TESTS | TABLES) & set(s.parts)]
    chosen = [s for s in code if _chosen(s)]
    rest = [s for s in code if not _chosen(s)]
    held_out, copies = _apart(chosen, of=rest + side)
    side = [s for s in side if not _quotes(s, held_out)]
    library, doubles = _once(rest + copies)
    side, more = _once(side)
    kept = {source.name for source in [*library, *side, *held_out]}
    dropped = [source.name for source in sources if source.name not in kept]
    assert len(doubles) + len(more) <= len(dropped)
    made = [Source(f"exercises/{i}", text) for i, text in enumerate(exercises(EXERCISES_SEED))]
    return Corpus(library, side, made, held_out, dropped)


def _chosen(source: Source) -> bool:
    draw = int.from_bytes(hashlib.sha256(source.name.encode()).digest()[:8])
    return draw % HELD_OUT_SHARE == 0 and len(source.text) >= SMALLEST_HELD_OUT


def _apart(chosen: list[Source], of: list[Source]) -> tuple[list[Source], list[Source]]:
    """Those with at most a tenth of their telling lines elsewhere, and the others."""
    elsewhere = {line for source in of for line in source.lines}
    own: list[Source] = []
    copies: list[Source] = []
    for source in chosen:
        shared = sum(line in elsewhere for line in source.lines)
        (copies if shared * 10 > len(source.lines) else own).append(source)
    return own, copies


def _once(sources: list[Source]) -> tuple[list[Source], list[Source]]:
    """Without files of which more than half was in files before: forty code pages are one."""
    seen: set[str] = set()
    kept: list[Source] = []
    doubles: list[Source] = []
    for source in sorted(sources, key=lambda source: source.name):
        lines = source.lines
        known = sum(line in seen for line in lines)
        (doubles if known * 2 > max(1, len(lines)) else kept).append(source)
        seen.update(lines)
    return kept, doubles


def _quotes(source: Source, held_out: list[Source]) -> bool:
    """A test named after a held-out module repeats its names and sentences."""
    names = {f"test_{Path(other.name).stem.strip('_')}" for other in held_out}
    return any(Path(part).stem in names for part in source.parts)
