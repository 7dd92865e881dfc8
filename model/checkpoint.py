"""A name, a folder, or nothing → a local folder, and what its config.json asks for.

Files here come from strangers: each is bounded in size before it is read, nothing in one is ever
run, and whatever is wrong with one is said in a single line that names it.
"""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub  # it imports its parts when they are used, so this costs nothing
from huggingface_hub import errors as hub

from model.config import ModelConfig
from model.families import FAMILIES, family_of
from model.family import Family
from model.readings import UnsupportedModelError

Json = Mapping[str, Any]

DEFAULT = Path(__file__).parent / "default"
CONFIG_BYTES = 4 << 20  # the largest in use are long lists of scaling factors: 100 kB
LAYERS, WIDEST, LONGEST = 1000, 1 << 24, 1 << 22  # absurd above: layers, any width, context
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "attention_types")
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
UNWANTED = ["*/*", "consolidated*"]  # other formats' folders, and a second copy of the weights
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


class CheckpointError(Exception):
    """What is wrong with a checkpoint, in one printable line of bounded length."""

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
        super().__init__(line if len(line) <= 1000 else line[:999] + "…")


def short(name: object) -> str:
    """A stranger's word, fit to be shown."""
    shown = repr(name)
    return shown if len(shown) <= 120 else shown[:80] + "…" + shown[-30:]


# ── where it is ───────────────────────────────────────────────────────────────────────────────


def locate(name: str | None = None) -> Path:
    """A folder is itself, a hub name is downloaded (or found in the cache), nothing is our own."""
    if name is None:
        return _default()
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise CheckpointError(f"{short(name)} is a file; a model is a folder with a config.json")
    if not HUB_NAME.fullmatch(name) or "--" in name or ".." in name:
        raise CheckpointError(
            f"{short(name)} is neither a folder nor a hub name such as 'Qwen/Qwen3-0.6B'"
        )
    return _download(name)


def _default() -> Path:
    if not any(DEFAULT.glob("*.safetensors")):
        raise CheckpointError(
            "this build has no embedded model yet: name a folder, or a model of the hub such as "
            "'Qwen/Qwen3-0.6B'"
        )
    return DEFAULT


def _download(name: str) -> Path:
    """The hub's own progress bar shows; HF_HUB_OFFLINE, HF_TOKEN and HF_HOME mean what they do."""
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        )
    except hub.GatedRepoError:
        reason = f"is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
    except hub.RepositoryNotFoundError:
        reason = "is not a folder here nor a model of the hub (or it is private: set HF_TOKEN)"
    except hub.IncompleteSnapshotError:
        reason = "is only partly downloaded, and the hub cannot be reached to get the rest"
    except hub.LocalEntryNotFoundError:
        reason = "is not a folder here nor in the hub's cache, and the hub cannot be reached" + (
            " because HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        )
    except Exception as error:  # network, proxy, disk: the library lets any of theirs through
        reason = f"could not be downloaded: {error}"
    raise CheckpointError(f"{name} {reason}")


# ── what it asks for ──────────────────────────────────────────────────────────────────────────


def describe(folder: Path) -> tuple[Family, ModelConfig]:
    """The family of a checkpoint and its network; generation_config.json knows best what ends."""
    h = dict(settings(folder))
    ends = generation(folder).get("eos_token_id")
    if ends is not None:
        h["eos_token_id"] = ends
    name, family = _family(h)
    try:
        config = family.read(name, h)
    except KeyError as error:
        raise CheckpointError(f"config.json of a {name} model lacks {error}") from error
    except UnsupportedModelError as error:
        raise CheckpointError(f"config.json: {error}") from error
    except Exception as error:  # families index a stranger's data freely: anything can come of it
        raise CheckpointError(f"config.json of a {name} model is wrong: {error!r}") from error
    _check_sizes(config)
    return family, config


def settings(folder: Path) -> Json:
    """config.json."""
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} has no config.json: it is not a model's folder")
    return read_json(path, CONFIG_BYTES)


def generation(folder: Path) -> Json:
    """generation_config.json: how its makers sample from it; empty when there is none."""
    path = folder / "generation_config.json"
    return read_json(path, CONFIG_BYTES) if path.exists() else {}


def _family(h: dict[str, Any]) -> tuple[str, Family]:
    kind = h.get("model_type")
    if method := h.get("quantization_config"):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"config.json: weights quantised with {short(method)} cannot be read; take the "
            "unquantised checkpoint, and quantise it to int8 while loading"
        )
    if "auto_map" in h and kind not in tuple(FAMILIES):
        raise CheckpointError(
            f"config.json: architecture {short(kind)} needs code that comes with the model "
            f"(auto_map), which is never run; supported are {', '.join(sorted(FAMILIES))}"
        )
    if not isinstance(kind, str):
        raise CheckpointError(f"config.json: model_type is {short(kind)}, expected a string")
    for key in LAYER_COUNTS:
        if (count := _largest(h.get(key))) > LAYERS:
            raise CheckpointError(f"config.json: {key} is {count:.6g}; at most {LAYERS} are read")
    try:
        return family_of(h)
    except UnsupportedModelError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _largest(value: object) -> float:
    if isinstance(value, list):
        return max(map(_largest, value), default=0)
    if isinstance(value, int):
        return float(value) if value.bit_length() < 1000 else math.inf
    return 0


def _check_sizes(config: ModelConfig) -> None:
    """Before anything is built from them: an absurd number must not become absurd work."""
    widths = ("vocabulary", "hidden", "heads", "kv_heads", "head_dim", "feed_forward")
    most = dict.fromkeys(widths, WIDEST) | {"layers": LAYERS, "context": LONGEST}
    for name, limit in most.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise CheckpointError(
                f"config.json: {name} is {short(value)}; expected an integer from 1 to {limit}"
            )


# ── reading ───────────────────────────────────────────────────────────────────────────────────


def read_head(path: Path, count: int) -> tuple[int, bytes]:
    """The size of a file and its first bytes. A pipe or a device could keep us waiting for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path.name} is not a regular file")
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size, file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def read_json(path: Path, limit: int) -> dict[str, Any]:
    size, data = read_head(path, limit)
    if size > limit:
        raise CheckpointError(f"{path.name} has {size} bytes; at most {limit} are read")
    return parse_json(data, path.name)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Strictly JSON (no NaN, no key twice, no bottomless nesting), and an object."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} holds no JSON object")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{short(twice)} is there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")
