"""Work that would hold up the event loop, in a few threads: large JSON, templates, large texts."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
LARGE = 64 << 10  # bytes; what is smaller takes less time than changing threads is worth


class Pool:
    def __init__(self, threads: int | None = None) -> None:
        count = threads or min(4, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="kvist-work")

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """The result of `work`, which has `size` bytes to chew on."""
        if size < LARGE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
