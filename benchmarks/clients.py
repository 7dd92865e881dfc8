"""A crowd of clients, each with a clock: of the engine in this process, or of a server on loopback.

Both ask for the same: prompts of ids, and `new` tokens each, the likeliest, whatever they are. Over
HTTP one loop hears all sockets, and what it heard is understood at the end: clients that read each
token as it comes take a third of two cores from the server that they measure.
"""

import json
import re
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.served import HEAD
from model.sampling import Sampling
from server import Engine
from server.engine.request import Request

Prompt = list[int]
PATIENCE = 600.0  # seconds
IDS = re.compile(rb'"token_ids":\s*\[([\d,\s]+)')


@dataclass
class Answer:
    """When tokens came, in seconds since the crowd began; several can come at once."""

    asked: float
    tokens: int = 0
    at: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.at[0] - self.asked

    @property
    def pace(self) -> float:
        """Seconds from token to token, on average."""
        return (self.at[-1] - self.at[0]) / max(self.tokens - 1, 1)

    def gaps(self, after: float, until: float) -> list[float]:
        """Seconds between what came and what came next, of all that lies between two moments."""
        pairs = zip(self.at, self.at[1:])
        return [late - early for early, late in pairs if early >= after and late <= until]


class Crowd:
    """Who asks when; how is for those who inherit."""

    def __init__(self, prompts: Sequence[Prompt], new: int) -> None:
        self.prompts, self.new = prompts, new
        self.answers: list[Answer] = []
        self.done = 0
        self.start = self.seconds = 0.0

    def run(self, clients: int, due: Sequence[float] = ()) -> list[Answer]:
        """So many at a time; or each when it is `due`, whether others are answered or not."""
        self.start = time.perf_counter()
        while self.done < len(self.prompts):
            while self._comes(clients, due):
                number = len(self.answers)
                # who is late because others are heard has waited already
                self.answers.append(Answer(due[number] if due else self.now()))
                self.ask(number)
            self.hear(max(due[len(self.answers)] - self.now(), 0.0) if self._more(due) else None)
        self.seconds = self.now()
        return self.understood()

    def _more(self, due: Sequence[float]) -> bool:
        return len(self.answers) < len(due)

    def _comes(self, clients: int, due: Sequence[float]) -> bool:
        if due:
            return self._more(due) and due[len(self.answers)] <= self.now()
        return len(self.answers) < min(len(self.prompts), self.done + clients)

    def now(self) -> float:
        return time.perf_counter() - self.start

    def ask(self, number: int) -> None:
        raise NotImplementedError

    def hear(self, pause: float | None) -> None:
        """Whatever comes next, or nothing for so long."""
        raise NotImplementedError

    def understood(self) -> list[Answer]:
        return self.answers


class Inside(Crowd):
    """Of an engine in this process."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], new: int) -> None:
        super().__init__(prompts, new)
        self.engine = engine

    def ask(self, number: int) -> None:
        greedy = Sampling(temperature=0)
        prompt = self.prompts[number]
        self.engine.submit(
            Request(id=str(number), prompt=prompt, max_tokens=self.new, sampling=greedy)
        )

    def hear(self, pause: float | None) -> None:
        if self.engine.idle:
            time.sleep(pause or 0.0)
            return
        events, now = self.engine.step(), self.now()
        for event in events:
            if event.error:
                raise RuntimeError(event.error)
            answer = self.answers[int(event.id)]
            count = sum(len(choice.tokens) for choice in event.choices)
            answer.tokens += count
            answer.at += [now] * (count > 0)
            self.done += event.done


class Outside(Crowd):
    """Of a server."""

    def __init__(self, port: int, prompts: Sequence[Prompt], new: int) -> None:
        super().__init__(prompts, new)
        self.port = port
        self.messages = [message(prompt, new) for prompt in prompts]
        self.heard: list[list[tuple[float, bytes]]] = [[] for _ in prompts]
        self.ears = selectors.DefaultSelector()

    def ask(self, number: int) -> None:
        one = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        one.sendall(self.messages[number])
        self.ears.register(one, selectors.EVENT_READ, number)

    def hear(self, pause: float | None) -> None:
        if not self.ears.get_map():
            time.sleep(pause or 0.0)
            return
        ready = self.ears.select(PATIENCE if pause is None else pause)
        if pause is None and not ready:
            raise RuntimeError(f"nothing came for {PATIENCE:.0f} s")
        for key, _ in ready:
            one = key.fileobj
            assert isinstance(one, socket.socket)
            data = one.recv(1 << 16)
            self.heard[key.data].append((self.now(), data))
            if not data:
                self.ears.unregister(one)
                one.close()
                self.done += 1

    def understood(self) -> list[Answer]:
        self.ears.close()
        for answer, parts in zip(self.answers, self.heard):
            _understand(answer, parts, self.new)
        return self.answers


def message(prompt: Prompt, new: int) -> bytes:
    fields = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    body = json.dumps({"prompt": prompt, "stream": True} | fields).encode()
    return f"{HEAD}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def _understand(answer: Answer, parts: Sequence[tuple[float, bytes]], new: int) -> None:
    """An event counts when its end is there."""
    rest = b""
    for when, data in parts:
        *events, rest = (rest + data).split(b"\n\n")
        ids = [found for event in events for found in IDS.findall(event)]
        answer.tokens += sum(found.count(b",") + 1 for found in ids)
        answer.at += [when] * (len(ids) > 0)
    if answer.tokens != new:
        said = b"".join(data for _, data in parts)[-300:]
        raise RuntimeError(f"{answer.tokens} tokens came instead of {new}: {said!r}")
