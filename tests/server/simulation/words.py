"""A vocabulary in which characters, and stop strings, fall apart into several tokens."""

from model.spelling import LETTERS, IncrementalDecoder, Letters, Speech
from server.engine.request import Request
from server.engine.text import Text
from tests.server.simulation.executor import VOCABULARY

SOME = [
    "a",
    "b",
    "c",
    " ",
    "\n",
    "ab",
    "abc",
    "bc",
    "st",
    "op",
    "stop",
    "é",
    "漢",
    "😀",
    "a漢",
    "ca",
]
CUT = [bytes([byte]) for byte in "é漢😀".encode()] + ["漢😀".encode()[1:5]]
PIECES = ([word.encode() for word in SOME] + CUT) * 3
PIECES = PIECES[:VOCABULARY]
END = VOCABULARY - 1  # what a model would say when it has said all
STOPS = ["ab", "abc", "bca", "stop", "é", "a漢", "\n", "opst", "😀a", "\ufffd"]

_letter = {byte: letter for letter, byte in LETTERS.items()}
_spelled = {i: "".join(_letter[byte] for byte in piece) for i, piece in enumerate(PIECES)}
_speech = Speech(_spelled, Letters(()), ())


def text(request: Request) -> Text:
    """The production assembly, over these words."""
    return Text(IncrementalDecoder(_speech, continuing=True), request.stop, request.include_stop)
