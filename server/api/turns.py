"""So many completions begin in one turn of the event loop, and the others in the next ones.

To read, check and tokenise a request takes a third of a millisecond. A thousand that come at once
would be one turn of a third of a second, for which health probes and the tokens of those who are
being answered wait. To begin an answer, or to end it, takes half of that, and one step may give
hundreds their first word, or their last.
"""

import asyncio
from collections import deque

MOST = 4


class Turns:
    """First come, first served."""

    def __init__(self) -> None:
        self._begun = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def mine(self) -> None:
        """Returns when it is one's turn."""
        loop = asyncio.get_running_loop()
        if self._begun == 0:
            loop.call_soon(self._next)
        if self._begun < MOST and not self._waiting:
            self._begun += 1
            return
        self._waiting.append(loop.create_future())
        await self._waiting[-1]

    def _next(self) -> None:
        self._begun = 0
        while self._waiting and self._begun < MOST:
            first = self._waiting.popleft()
            if not first.done():  # else its client has left meanwhile
                first.set_result(None)
                self._begun += 1
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next)
