"""A server on loopback as an engine: as many clients at once as there are streams."""

import json
import random
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.peers import Beyond

LETTERS = "abcdefghijklmnopqrstuvwxyz "
PATIENCE = 600.0


class Server:
    """Streams completions. Prompts are texts, since not all servers take ids."""

    def __init__(
        self, command: Sequence[str], port: int, folder: Path, fields: Mapping[str, Any]
    ) -> None:
        self.port, self.fields = port, fields
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.process = subprocess.Popen(command)
        end = time.monotonic() + PATIENCE
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"it did not come up: status {self.process.poll()}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        line = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            line.request("GET", "/health")
            return line.getresponse().status == 200
        except OSError:
            return False
        finally:
            line.close()

    def generate(self, prompts: Sequence[list[int]], new: int, beams: int) -> list[list[int]]:
        if beams > 1:
            raise Beyond("only streams are compared over HTTP")
        texts = [self._text(prompt) for prompt in prompts]
        with ThreadPoolExecutor(len(texts)) as crowd:
            return list(crowd.map(lambda text: self._ask(text, new), texts))

    def _text(self, prompt: list[int]) -> str:
        """As many tokens as `prompt`, and others wherever that is other."""
        chance = random.Random(repr(prompt))
        letters = "".join(chance.choices(LETTERS, k=4 * len(prompt)))
        text: str = self.tokenizer.decode(self.tokenizer.encode(letters).ids[: len(prompt)])
        return text

    def _ask(self, text: str, new: int) -> list[int]:
        """The tokens' number is told at the end; which ones they were is not asked here."""
        line = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        body = {"prompt": text, "max_tokens": new, "temperature": 0, "stream": True, **self.fields}
        line.request(
            "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
        )
        with line.getresponse() as answer:
            events = answer.read().decode().split("\n\n")
        line.close()
        told = [json.loads(event[6:]) for event in events[-4:] if event.startswith("data: {")]
        usage = [event["usage"] for event in told if event.get("usage")]
        if not usage:
            raise RuntimeError(f"no usage was told: {events[-1][-300:]}")
        return [0] * int(usage[-1]["completion_tokens"])
