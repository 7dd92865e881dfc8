"""Our side of `sandboxed.py`: the process is started when needed, and again when it was ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Reply = dict[str, Any]  # "text"; or "refusal", "wrong" (sentences), "long"; empty: it has started

PROGRAM = Path(__file__).with_name("sandboxed.py")
KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME")
LATE = (-signal.SIGPROF, -signal.SIGALRM)


class Sandbox:
    """Renders some templates for any number of threads, one after another."""

    def __init__(self, sources: Mapping[str, str], seconds: float, size: int) -> None:
        caps = {"seconds": seconds, "size": size}
        self._start = json.dumps({"sources": dict(sources), **caps})
        self._seconds = seconds
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[str]] = []
        weakref.finalize(self, _end, self._running)

    def start(self) -> Reply:
        """Compile the templates now. What is wrong with them, or nothing."""
        with self._lock:
            return self._begin()

    def render(self, name: str, names: Mapping[str, Any]) -> Reply:
        try:
            line = json.dumps([name, names])
        except (TypeError, ValueError, RecursionError) as error:
            return {"wrong": f"they are not plain JSON: {error}"}
        with self._lock:
            reply = self._render(line)
            # A process that somebody else ended while it was idle is no fault of this chat.
            return self._render(line) if "gone" in reply else reply

    def _render(self, line: str) -> Reply:
        return (None if self._running else self._begin()) or self._exchange(line)

    def _begin(self) -> Reply:
        environ = {name: os.environ[name] for name in KEPT if name in os.environ}
        # -P: the folder of the program is not a place to import from
        program = [sys.executable, "-P", str(PROGRAM)]
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(  # noqa: S603, the program is our own
            program,
            stdin=pipe,
            stdout=pipe,
            stderr=none,
            env=environ,
            text=True,
            start_new_session=True,  # Ctrl-C is for the server, which may still have chats to end
        )
        self._running.append(process)
        return self._exchange(self._start)

    def _exchange(self, line: str) -> Reply:
        [process] = self._running
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        if reply := process.stdout.readline():
            return dict(json.loads(reply))
        _end(self._running)
        if process.returncode in LATE:
            return {"wrong": f"it takes longer than {self._seconds:g} s"}
        return {"wrong": f"its process ended with {process.returncode}", "gone": True}


def _end(running: list[subprocess.Popen[str]]) -> None:
    while running:
        process = running.pop()
        process.kill()
        with suppress(BrokenPipeError), process:  # closes the pipes, and waits
            pass
