"""The parent's hold on a worker. Between its turns a worker is stopped, so that it cannot spin."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS, Work


class Failed(Exception):
    """An engine could not do it; the message is its reason."""


class Remote:
    """A running engine."""

    def __init__(self, engine: str, form: str, folder: Path, threads: int, words: int) -> None:
        self.log = folder.parent / f"{engine}-{form}.serve.log"
        command = _command("serve", engine, str(folder), form, str(threads), str(words))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(threads),
                start_new_session=True,  # so that a server's own processes sleep and end with it
            )
        self.peak = 0
        self._wait(900)

    def ask(self, work: Work, patience: float) -> dict[str, Any]:
        """Wake it, let it work, and put it to sleep."""
        assert self.process.stdin is not None
        self._tell(signal.SIGCONT)
        try:
            print(json.dumps(asdict(work)), file=self.process.stdin, flush=True)
        except OSError as error:
            raise Failed(f"it had ended: {_last(self.log)}") from error
        answer = self._wait(patience)
        self.peak = max(self.peak, answer["peak"])
        return answer

    def _wait(self, patience: float) -> dict[str, Any]:
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], patience)[0]:
            self.close()
            raise Failed(f"it said nothing for {patience:.0f} s")
        line = out.readline()
        if not line:
            raise Failed(f"it ended with status {self.process.wait()}: {_last(self.log)}")
        self._tell(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def _tell(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        self._tell(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe:
                    pipe.close()


def convert(engine: str, source: Path, form: str, work: Path) -> Path:
    """The folder with the weights in that engine's format, written unless it is there."""
    folder = work / f"{engine}-{form}"
    if not PEERS[engine].converts:
        return source
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _run(folder, "write", engine, str(source), str(folder), form)
    return folder


def source(shape: str, work: Path) -> Path:
    folder = work / "source"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _run(folder, "source", shape, str(folder))
    return folder


def _run(folder: Path, *words: str) -> None:
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as file:
        status = subprocess.run(_command(*words), stderr=file, check=False).returncode
    if status:
        raise Failed(f"writing its format ended with status {status}: {_last(log)}")
    (folder / "done").touch()


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.peers.worker", *words]


def _environment(threads: int) -> dict[str, str]:
    """Each engine is told its threads in its own way; this is for the libraries below it."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"HF_HUB_OFFLINE": "1"}


def _last(log: Path) -> str:
    """The last thing that it printed, which is mostly the reason."""
    text = log.read_text(errors="replace").replace(f"{log.parent}/", "")
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if line), "without a word")[:300]
