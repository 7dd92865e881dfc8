"""Whether the engine lives, as a stamp in memory that it shares with the front.

The engine says until when it wants to be believed alive: it knows best how long what it begins may
take. Both read the same monotonic clock. What is too long is 20 median steps, 4 times the longest
step of that many tokens, at least five seconds, and two minutes for what was never seen before.
"""

import mmap
import os
import struct
import tempfile
import time
from collections import deque
from statistics import median

STAMP = struct.Struct("<dd")  # when it was last alive, until when that is enough
FLOOR, UNSEEN = 5.0, 120.0  # seconds


class Heart:
    """The shared page; either side maps it by its file descriptor."""

    def __init__(self, fd: int | None = None) -> None:
        if fd is None:
            with tempfile.TemporaryFile() as file:
                file.truncate(mmap.PAGESIZE)
                fd = os.dup(file.fileno())
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)

    def beat(self, seconds: float = FLOOR) -> None:
        """Alive now, and to be believed so for this long."""
        now = time.monotonic()
        STAMP.pack_into(self._page, 0, now, now + seconds)

    @property
    def age(self) -> float:
        """Seconds since the last beat."""
        return max(time.monotonic() - STAMP.unpack_from(self._page)[0], 0.0)

    @property
    def stale(self) -> bool:
        return time.monotonic() > STAMP.unpack_from(self._page)[1]

    def close(self) -> None:
        self._page.close()
        os.close(self.fd)


class Pace:
    """How long steps take here, by the power of two of their tokens."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=64)
        self._longest: dict[int, float] = {}

    def saw(self, tokens: int, seconds: float) -> None:
        size = tokens.bit_length()
        self._recent.append(seconds)
        self._longest[size] = max(seconds, 0.99 * self._longest.get(size, 0.0))

    def patience(self, tokens: int) -> float:
        """How long a step of so many may take before something must be wrong."""
        known = [t for size, t in self._longest.items() if size >= tokens.bit_length()]
        if not known:
            return UNSEEN
        return max(FLOOR, 20 * median(self._recent), 4 * min(known))
