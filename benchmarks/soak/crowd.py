"""A crowd of streaming clients: `… -m benchmarks.soak.crowd KIND PORT SECONDS RATE …`

    hasty     so many newcomers a second, each of whom hangs up when its answer begins
    leavers   as many, each of whom hangs up at any moment of its own
    stayers   as many, who ask for no more than a leaver gets, and stay until they have it

The kernel keeps what a client is sent until it leaves, or all is there. So a client costs less than
0.2 ms, and not 0.05 ms more a token as one that reads each of them: the load is the server's. From
a process of its own, which prints what they got as JSON.
"""

import asyncio
import json
import random
import re
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, repeat

from benchmarks.served import HEAD, status

PATIENCE = 30.0  # seconds
IN_TIME = struct.pack("ll", int(PATIENCE), 0)  # the same as the kernel reads it
READ = 64 << 10  # bytes
END = 1 << 20  # bytes, more than any answer has
BEGINNING, WHOLE = (1, b"data: "), (END, b"data: [DONE]")  # how many bytes, and what is in them
MOST = 200  # tokens, far more than a leaver stays for
IDS = re.compile(rb'"token_ids":\[([\d,]+)')


@dataclass
class Crowd:
    """What all of them got."""

    clients: int = 0
    tokens: int = 0
    failed: int = 0  # got no stream, or one with an error in it, or not what they came for

    def goes(self, one: socket.socket, wanted: bytes = b"") -> None:
        data = _got(one)
        one.close()
        self.clients += 1
        self.tokens += sum(ids.count(b",") + 1 for ids in IDS.findall(data))
        wrong = bool(data) and (status(data) != 200 or b'data: {"error"' in data)
        self.failed += wrong or wanted not in data


def hasty(port: int, seconds: float, rate: float) -> Crowd:
    """They come at even distances."""
    return _woken(port, seconds, rate, repeat(message(MOST)), BEGINNING)


def leavers(port: int, seconds: float, rate: float, longest: float) -> Crowd:
    """They come at even distances, and stay from nothing to `longest` seconds."""
    rng, crowd, here = random.Random(1), Crowd(), dict[int, socket.socket]()
    raw, began = message(MOST), time.monotonic()
    comes = [number / rate for number in range(round(rate * seconds))]
    leaves = [when + rng.uniform(0, longest) for when in comes]
    timetable = [(when, 0, number) for number, when in enumerate(comes)]
    timetable += [(when, 1, number) for number, when in enumerate(leaves)]
    for when, leaving, number in sorted(timetable):
        time.sleep(max(0.0, began + when - time.monotonic()))
        if leaving:
            crowd.goes(here.pop(number))
        else:
            here[number] = _come(port, raw, END)
    return crowd


def stayers(port: int, seconds: float, rate: float, tokens: float) -> Crowd:
    """They come at even distances, and ask for anything from one token to twice so many."""
    rng, most = random.Random(1), max(1, round(2 * tokens) - 1)
    return _woken(port, seconds, rate, (message(rng.randint(1, most)) for _ in count()), WHOLE)


def _woken(
    port: int, seconds: float, rate: float, asked: Iterator[bytes], came_for: tuple[int, bytes]
) -> Crowd:
    """Each goes when so many bytes are there for it, or its answer is over."""
    crowd, here, began = Crowd(), dict[int, socket.socket](), time.monotonic()
    enough, wanted = came_for
    with select.epoll() as ears:

        def goodbyes(seconds: float) -> bool:
            """Let those go who have what they came for; whether there were any."""
            ready = ears.poll(seconds)
            for fd, _ in ready:  # epoll forgets what is closed
                crowd.goes(here.pop(fd), wanted)
            return bool(ready)

        for number in range(round(rate * seconds)):
            while (left := began + number / rate - time.monotonic()) > 0:
                goodbyes(left)
            one = _come(port, next(asked), enough)
            here[one.fileno()] = one
            ears.register(one, select.EPOLLIN)
        while here and goodbyes(PATIENCE):
            pass
    for one in here.values():  # nobody answers them any more
        crowd.goes(one, wanted)
    return crowd


def message(tokens: int) -> bytes:
    body = {"prompt": "Once upon a time", "stream": True, "temperature": 0, "ignore_eos": True}
    raw = json.dumps(body | {"max_tokens": tokens, "return_token_ids": True}).encode()
    return f"{HEAD}content-length: {len(raw)}\r\nconnection: close\r\n\r\n".encode() + raw


def _come(port: int, raw: bytes, enough: int) -> socket.socket:
    one = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, IN_TIME)
    if enough > 1:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
    try:
        one.connect(("127.0.0.1", port))
        one.sendall(raw)
    except OSError:
        one.close()
        raise
    return one


def _got(one: socket.socket) -> bytes:
    """All that the kernel has for it by now."""
    data = b""
    try:
        while part := one.recv(READ, socket.MSG_DONTWAIT):
            data += part
            if len(part) < READ:
                break
    except OSError:  # nothing more yet, or the server hung up
        pass
    return data


async def crowd(how: Callable[..., Crowd], *numbers: float) -> Crowd:
    """One of these, from another process."""
    command = [sys.executable, "-m", "benchmarks.soak.crowd", how.__name__, *map(str, numbers)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    return Crowd(**json.loads(told))


def main(how: str, port: str, *numbers: str) -> None:
    kinds: dict[str, Callable[..., Crowd]] = {}
    kinds |= {kind.__name__: kind for kind in (hasty, leavers, stayers)}
    print(json.dumps(asdict(kinds[how](int(port), *map(float, numbers)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
