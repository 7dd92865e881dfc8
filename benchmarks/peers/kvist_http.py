"""Kvist's server, with the settings of the offline engine beside it."""

import sys
from pathlib import Path

from benchmarks.peers import CONTEXT, STREAMS
from benchmarks.peers.over_http import Server
from benchmarks.served import free_port


class Peer(Server):
    def __init__(self, folder: Path, form: str, threads: int) -> None:
        port = free_port()
        flags = {
            "--port": port,
            "--threads": threads,
            "--dtype": "float32",
            "--quantize": "none" if form == "float32" else form,
            "--rows": STREAMS,
            "--pages": STREAMS * CONTEXT // 16,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        command = [
            sys.executable,
            "-m",
            "server",
            "serve",
            str(folder),
            "--no-prefix-cache",
            *words,
        ]
        fields = {"ignore_eos": True, "stream_options": {"include_usage": True}}
        super().__init__(command, port, folder, fields)
