"""transformers' server with continuous batching: `transformers serve`."""

import json
import sys
from pathlib import Path

from benchmarks.peers import CONTEXT, STREAMS
from benchmarks.peers.continuous import PAGE
from benchmarks.peers.over_http import Server
from benchmarks.served import free_port


class Peer(Server):
    def __init__(self, folder: Path, form: str, threads: int) -> None:  # noqa: ARG002
        """Its threads are told by the environment."""
        port = free_port()
        flags = {
            "--port": port,
            "--host": "127.0.0.1",
            "--device": "cpu",
            "--dtype": form,
            "--cb-block-size": PAGE,
            "--cb-num-blocks": STREAMS * CONTEXT // PAGE,
            "--cb-max-batch-tokens": 2048,
        }
        words = [str(word) for pair in flags.items() for word in pair]
        command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder)]
        wish = {"eos_token_id": -1, "pad_token_id": 0, "do_sample": False}
        fields = {"model": str(folder), "generation_config": json.dumps(wish)}
        super().__init__([*command, "--continuous-batching", *words], port, folder, fields)
