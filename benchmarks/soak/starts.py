"""G12: starts that cannot succeed end soon, each naming its cause; a signal ends one that loads."""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from benchmarks.served import Served, free_port
from benchmarks.soak.ask import Row, row, until
from model.checkpoint import locate

Break = Callable[[Path], None]
FILES = ("*.json", "*.safetensors", "*.jinja")  # of a model
PATIENCE, PORT, SIGNAL = 60.0, 5.0, 5.0  # seconds: any start, a taken port, a signal


def write(name: str, text: str) -> Break:
    def apply(folder: Path) -> None:
        (folder / name).write_text(text)

    return apply


def change(**fields: object) -> Break:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return apply


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def truncate(name: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / name, size)


BROKEN: dict[str, tuple[Break, str]] = {  # what is done to a model's folder, and what is said of it
    "a config that is none": (write("config.json", "{"), "config.json"),
    "a config that is a list": (write("config.json", "[]"), "config.json"),
    "no config": (remove("config.json"), "config.json"),
    "an unknown family": (change(model_type="abacus", architectures=["Abacus"]), "(?i)abacus"),
    "no number of heads": (change(num_attention_heads=None), "lacks 'attention_heads'"),
    "a width that is text": (change(hidden_size="wide"), "hidden is 'wide'"),
    "heads below zero": (change(num_attention_heads=-4), "heads"),
    "layers without weights": (change(num_hidden_layers=99), "model.safetensors: tensor"),
    "an absurd vocabulary": (change(vocab_size=9_999_999), "model.safetensors: tensor"),
    "code that it needs": (change(auto_map={"AutoModel": "own.Model"}, model_type="own"), "own"),
    "no weights": (remove("model.safetensors"), "has no weights"),
    "weights cut off": (truncate("model.safetensors", 5000), "model.safetensors.*truncated"),
    "an empty file of weights": (truncate("model.safetensors", 0), "model.safetensors"),
    "no words": (remove("tokenizer.json"), "tokenizer.json"),
    "words cut off": (truncate("tokenizer.json", 999), "tokenizer.json is not valid JSON"),
    "words that are a list": (write("tokenizer.json", "[]"), "tokenizer.json"),
    "words of an unknown kind": (
        write("tokenizer.json", '{"model": {"type": "Markov", "vocab": {"a": 0}}}'),
        "tokenizer",
    ),
    "roles that are none": (write("tokenizer_config.json", "{"), "tokenizer_config.json"),
}

SETTINGS: list[tuple[list[str], str]] = [  # what is asked for, and what is said of it
    (["--prot", "1"], "unrecognized arguments: --prot"),
    (["--port", "many"], "--port is 'many'"),
    (["--context", "0"], "--context is '0'"),
    (["--quantize", "int3"], "int3"),
    (["--api-keys", "/nowhere/keys"], "--api-keys is '/nowhere/keys', but there is no"),
    (["--config", "/nowhere/kvist.toml"], "/nowhere/kvist.toml cannot be read"),
    (["--host", "nowhere.invalid"], "nowhere.invalid:.* cannot be listened on"),
    (["--tls-cert", __file__, "--tls-key", __file__], "no certificate"),
]


@contextmanager
def broken(model: Path, name: str) -> Iterator[Path]:
    """A copy of the model's folder, broken this way."""
    with tempfile.TemporaryDirectory() as made:
        for pattern in FILES:
            for file in model.glob(pattern):
                shutil.copy(file, made)
        BROKEN[name][0](Path(made))
        yield Path(made)


async def starts(asked: argparse.Namespace) -> Row:
    """G12: broken models, bad settings, a taken port; and SIGTERM while a model loads."""
    model = locate(asked.model)
    flags = [
        await refused(str(model), *some, says=says) for some, says in tqdm(SETTINGS, disable=None)
    ]
    models = []
    for name in tqdm(BROKEN, disable=None):
        with broken(model, name) as folder:
            models.append(await refused(str(folder), says=BROKEN[name][1]))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        taken_s = await refused(str(model), "--port", port, says=f"{port} cannot be listened on")
    signal_s = [await stopped(str(model)) for _ in range(asked.times)]
    slowest = max(*flags, *models, taken_s)
    found = {"starts": len(flags) + len(models) + 1, "slowest_s": round(slowest, 1)}
    found |= {"port_s": round(taken_s, 1), "signal_s": round(max(signal_s), 1)}
    good = slowest < PATIENCE and taken_s < PORT and max(signal_s) < SIGNAL
    return row("G12", "starts", good, found, [])


async def refused(*arguments: str, says: str) -> float:
    """Seconds until it ended, not with 0 and the cause as its last line; else for ever."""
    began = time.monotonic()
    process = await _start("--port", str(free_port()), *arguments)
    try:
        _, told = await asyncio.wait_for(process.communicate(), PATIENCE)
    except TimeoutError:
        process.kill()
        return float("inf")
    last = (told.decode().splitlines() or [""])[-1]
    if not process.returncode or not re.search(says, last) or b"Traceback" in told:
        print(f"{arguments}: status {process.returncode}, {last[:300]!r} instead of {says!r}")
        return float("inf")
    return time.monotonic() - began


async def stopped(model: str) -> float:
    """Seconds from SIGTERM to an exit with 0 and no child left, while a model loads."""
    port = free_port()
    one = Served(await _start(model, "--port", str(port)), port)
    await until(lambda: one.status("/health/live"), 200)
    children, began = one.children(), time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    with suppress(TimeoutError):
        await asyncio.wait_for(one.process.communicate(), PATIENCE)
    left = [pid for pid in children if Path(f"/proc/{pid}/stat").exists()]
    return time.monotonic() - began if one.process.returncode == 0 and not left else float("inf")


async def _start(*arguments: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "server", "serve", *arguments]
    return await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
