"""Names, folders, the hub (a stand-in of it on loopback), and configs that strangers wrote."""

import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers

from model import checkpoint
from model.checkpoint import CheckpointError, describe, generation, locate, read_json, settings

CONFIG: dict[str, Any] = transformers.LlamaConfig(
    vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
).to_dict()


def write(folder: Path, **changes: Any) -> Path:
    text = json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not ...})
    (folder / "config.json").write_text(text)
    return folder


# ── locate ────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(tmp_path)) == tmp_path
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("gpt2") == Path("gpt2")  # a folder comes before a hub name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("~/gpt2") == tmp_path / "gpt2"


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file; a model is a folder"):
        locate(str(path))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../x", "x/..", "a/../b", "a/b/c", "/nowhere", "~nobody/x", "a//b"),
        *("-a/b", "a--b/c", "http://x/y", "a\\b", "a\0b", "a\nb", "x" * 5000, "ä/b", "a/b@c"),
        *("a b", "%2e/a"),
    ],
)
def test_odd_names_are_refused_without_a_connection(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    if name in (".", ".."):
        assert locate(name).is_dir()
        return
    with pytest.raises(CheckpointError, match="neither a folder nor a hub name") as caught:
        locate(name)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_nothing_is_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "DEFAULT", tmp_path)
    with pytest.raises(CheckpointError, match="no embedded model"):
        locate()
    (tmp_path / "model.safetensors").touch()
    assert locate(None) == tmp_path


# ── the hub ───────────────────────────────────────────────────────────────────────────────────

SHA = "5" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ x }}",
    "pytorch_model.bin": b"never",
    "consolidated.safetensors": b"never",
    "onnx/config.json": b"never",
    "train.py": b"never",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for. `closed/…` is gated, `no/…` is not there."""

    protocol_version = "HTTP/1.1"
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "/closed/" in path:
            self._send(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "no"})
        elif "/no/" in path:
            self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        elif path.startswith("/api/models/open/model/tree/"):
            tree = [{"type": "file", "path": p, "size": len(d), "oid": p} for p, d in FILES.items()]
            self._send(json.dumps(tree).encode())
        elif path.startswith("/api/models/open/model"):
            self._send(json.dumps({"id": "open/model", "sha": SHA}).encode())
        else:
            data = FILES[path.split(f"/resolve/{SHA}/")[1]]
            self._send(data, 200, {"X-Repo-Commit": SHA, "ETag": f'"{path.replace("/", "-")}"'})

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Hub.asked.clear()
    constants = huggingface_hub.constants
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def test_a_hub_name_is_downloaded_once_and_only_what_is_needed(
    hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = locate("open/model")
    wanted = {"config.json", "model.safetensors", "merges.txt", "chat_template.jinja"}
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == wanted
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert locate("open/model") == folder
    assert not hub.asked


@pytest.mark.parametrize(
    ("name", "offline", "sentence"),
    [
        ("closed/model", False, "closed/model is gated: accept its terms at https://huggingface"),
        ("no/model", False, "no/model is not a folder here nor a model of the hub"),
        ("open/model", True, "nor in the hub's cache, .* because HF_HUB_OFFLINE is set"),
    ],
)
def test_what_the_hub_refuses(
    name: str, offline: bool, sentence: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError, match=sentence):
        locate(name)


def test_a_hub_that_does_not_answer(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"and the hub cannot be reached$"):
        locate("open/model")


# ── config.json ───────────────────────────────────────────────────────────────────────────────


def test_a_config_is_read(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=2)
    family, config = describe(tmp_path)
    assert (config.family, config.layers, config.eos) == ("llama", 2, (2,))
    assert family.place("model.norm.weight", config)
    assert generation(tmp_path) == {}
    assert settings(tmp_path)["hidden_size"] == 32


def test_generation_config_knows_best_what_ends(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_k": 5}')
    assert describe(tmp_path)[1].eos == (7, 8)
    assert generation(tmp_path)["top_k"] == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba' is not supported; supported are bloom, "),
        ({"model_type": ["llama"]}, "model_type is .*expected a string"),
        ({"model_type": ...}, "model_type is None"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "canary.Model"}},
            "'mine' needs code that comes with the model .* never run; supported are",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"vocab_size": ...}, "lacks 'vocab_size'"),
        ({"vocab_size": 1 << 60}, "vocabulary is 1152921504606846976; expected an integer"),
        ({"vocab_size": "67"}, "vocabulary is '67'"),
        ({"hidden_size": -8}, "hidden is -8; expected an integer from 1"),
        ({"hidden_size": 32.5}, "hidden"),
        ({"hidden_size": [1]}, "hidden is .1.; expected"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1e\\+09; at most 1000"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers is inf; at most 1000"),
        (
            {"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]},
            "attention_types is 1e\\+12; at most 1000",
        ),
        ({"num_attention_heads": 0}, "config.json of a llama model is wrong|heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "cannot share"),
        ({"max_position_embeddings": 10**12}, "context is 1000000000000; expected"),
        ({"hidden_act": "import os"}, "activation 'import os' is not supported"),
        ({"rope_parameters": "none"}, "config.json of a llama model is wrong"),
    ],
)
def test_a_config_that_asks_for_what_cannot_be(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        describe(write(tmp_path, **changes))
    message = str(caught.value)
    assert message.startswith("config.json")
    assert message.isprintable()
    assert len(message) <= 1000


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """A known architecture is read by our own code, whatever its auto_map says."""
    canary = tmp_path / "canary"
    (tmp_path / "canary.py").write_text(f"open({str(canary)!r}, 'w')")
    describe(write(tmp_path, auto_map={"AutoModelForCausalLM": "canary.Model"}))
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "holds no JSON object"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "has 2009 bytes; at most 1000"),
    ],
)
def test_broken_json(text: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match=f"config.json.*{sentence}") as caught:
        read_json(path, 1000 if len(text) == 2009 else 1 << 20)
    assert str(caught.value).isprintable()


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        settings(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json is not a regular file"):
        settings(tmp_path)
    (tmp_path / "config.json").rmdir()
    os.mkfifo(tmp_path / "config.json")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match=r"config\.json is not a regular file"):
        settings(tmp_path)


def test_an_error_is_one_printable_line() -> None:
    message = str(CheckpointError("a\nb\t\x1b[31mc\u202e" + "d" * 5000))
    assert message.startswith("a b  [31mc d")
    assert len(message) == 1000
