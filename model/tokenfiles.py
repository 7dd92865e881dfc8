"""A tokenizer's files → one document of tokenizer.json's form, and what its special tokens are for.

Files here come from strangers: they are bounded before they are read, checked before anything is
indexed, and what is wrong is said in one line that names the file.
"""

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]

FILE_BYTES = 256 << 20  # the largest in use, with 260,000 tokens and their merges, has 33 MB
TOKENS = 1 << 22  # absurd above
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Where there is only vocab.json and merges.txt, the class says how a text is cut into words …
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LIKE_GPT2 = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer")
LIKE_QWEN2 = ("Qwen2Tokenizer",)
# … and where nobody names a class, the model does.
CLASS_OF_MODEL = dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt"), "GPT2Tokenizer")
CLASS_OF_MODEL |= dict.fromkeys(("codegen", "phi"), "CodeGenTokenizer")
CLASS_OF_MODEL |= dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer")
CONVERT = (
    "from transformers import AutoTokenizer as T; "
    "T.from_pretrained('FOLDER').save_pretrained('NEW')"
)
OTHERS = ("tokenizer.model", "tekken.json", "tiktoken.model", "spiece.model")


class TokenizerError(Exception):
    """What is wrong with a tokenizer's files, in one printable line of bounded length."""

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else " " for c in " ".join(message.split()))
        super().__init__(line if len(line) <= 1000 else line[:999] + "…")


@dataclass(frozen=True)
class TokenFiles:
    """All that a folder says about its words."""

    document: Json  # tokenizer.json, complete: with the added tokens that other files name
    vocabulary: Mapping[str, int]  # of the model inside, without added tokens
    added: list[dict[str, Any]]  # the added tokens, each with all flags and the id that counts
    names: dict[str, str]  # "eos_token" → "</s>" and so on
    eos: tuple[int, ...]
    bos: int | None


def read(folder: Path) -> TokenFiles:
    config = _object(folder / "tokenizer_config.json")
    names = _names(folder, config)
    if (folder / "tokenizer.json").exists():
        document = _object(folder / "tokenizer.json")
    else:
        document = _assemble(folder, config, names)
    vocabulary = _vocabulary(document)
    added = _added(document, vocabulary, _more_added(folder, config), names)
    ids = dict(vocabulary) | {token["content"]: token["id"] for token in added}
    if len(set(ids.values())) < len(ids):
        raise TokenizerError("tokenizer.json: two tokens have one id, or ids have gaps")
    model = {**document["model"], "dropout": None}  # noise for training
    truths = {"model": model, "added_tokens": added, "truncation": None, "padding": None}
    return TokenFiles(
        {**document, **truths},
        vocabulary,
        added,
        {name: token for name, token in names.items() if token in ids},
        _role(folder, "eos", names, ids),
        next(iter(_role(folder, "bos", names, ids)), None),
    )


def flatten(step: Json | None, key: str) -> list[Json]:
    """A Sequence of steps, however nested, as one list."""
    if not step:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [deep for inner in step[key] for deep in flatten(inner, key)]


# ── reading ───────────────────────────────────────────────────────────────────────────────────


def load_text(path: Path) -> str:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise TokenizerError(f"{path.name} is not a regular file")
        if found.st_size > FILE_BYTES:
            raise TokenizerError(
                f"{path.name} has {found.st_size} bytes; at most {FILE_BYTES} are read"
            )
        return path.read_bytes()[: FILE_BYTES + 1].decode()
    except OSError as error:
        raise TokenizerError(f"{path.name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path.name} is not UTF-8: {error}") from error


def load_json(path: Path) -> Any:
    try:
        return json.loads(load_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.exists():
        return {}
    found = load_json(path)
    if not isinstance(found, dict):
        raise TokenizerError(f"{path.name} holds no JSON object")
    return found


def _vocabulary(document: Json) -> dict[str, int]:
    model = document.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, list):  # Unigram: pieces and scores, ids in order
        if not all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in found):
            raise TokenizerError("tokenizer.json: the vocabulary is no list of pieces and scores")
        found = {piece[0]: i for i, piece in enumerate(found)}
    if not isinstance(found, dict) or not found:
        raise TokenizerError("tokenizer.json: the model has no vocabulary")
    if len(found) > TOKENS:
        raise TokenizerError(f"tokenizer.json has {len(found)} tokens; at most {TOKENS} are read")
    for token, i in found.items():
        if type(i) is not int or not 0 <= i < 2 * TOKENS:
            raise TokenizerError(f"tokenizer.json: token {token!r:.80} has id {i!r:.40}")
    return found


# ── special tokens, and what they are for ─────────────────────────────────────────────────────


def _names(folder: Path, config: Json) -> dict[str, str]:
    """bos_token, eos_token and whatever else is named *_token, for chat templates too."""
    found: dict[str, str] = {}
    sources: list[Any] = [_object(folder / "special_tokens_map.json"), config]
    for source in sources + [source.get("extra_special_tokens") for source in sources]:
        for name, token in source.items() if isinstance(source, dict) else ():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str) and content:
                found[name] = content
    return found


def _more_added(folder: Path, config: Json) -> list[dict[str, Any]]:
    """Added tokens that are not told in tokenizer.json, in the order of their ids."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict) and all(key.isdecimal() for key in listed):
        return [listed[key] for key in sorted(listed, key=int)]
    legacy = _object(folder / "added_tokens.json")
    in_order = sorted((i, content) for content, i in legacy.items() if type(i) is int)
    return [{"content": content, "special": False, "normalized": True} for _, content in in_order]


def _added(
    document: Json, vocabulary: Json, more: list[dict[str, Any]], names: dict[str, str]
) -> list[dict[str, Any]]:
    """The added tokens with the ids that the tokenizers library gives them, which are those that
    the model was trained with: the vocabulary's own, else the next free one; never the file's."""
    listed = document.get("added_tokens") or []
    if not isinstance(listed, list):
        raise TokenizerError("tokenizer.json: added_tokens is not a list")
    special = dict.fromkeys(names.values())
    named = [{"content": token, "special": True} for token in special if token in vocabulary]
    found: dict[str, dict[str, Any]] = {}
    free = len(vocabulary)
    for token in [*listed, *more, *named]:
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str):
            raise TokenizerError(f"tokenizer.json: {token!r:.80} is not an added token")
        if content and content not in found:
            flags = {flag: bool(token.get(flag)) for flag in FLAGS}
            flags["special"] |= content in special
            flags["normalized"] = bool(token.get("normalized", not flags["special"]))
            found[content] = {"id": vocabulary.get(content, free), "content": content, **flags}
            free = max(free, found[content]["id"] + 1)
    return list(found.values())


def _role(folder: Path, role: str, names: dict[str, str], ids: dict[str, int]) -> tuple[int, ...]:
    """Who ends (or begins) a text: the tokenizer's name for it and generation_config.json, and
    only where both are silent config.json. Ids that no token has are nobody's."""
    name = names.get(f"{role}_token", "")
    told = [ids[name]] if name in ids else []
    told += _ids(_object(folder / "generation_config.json").get(f"{role}_token_id"))
    told = told or _ids(_object(folder / "config.json").get(f"{role}_token_id"))
    known = set(ids.values())
    return tuple(dict.fromkeys(i for i in told if i in known))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int]


# ── vocab.json and merges.txt ─────────────────────────────────────────────────────────────────


def _assemble(folder: Path, config: Json, names: dict[str, str]) -> dict[str, Any]:
    """What tokenizer.json would be. The name of the class decides, as it does for transformers."""
    if not (folder / "vocab.json").exists() or not (folder / "merges.txt").exists():
        raise TokenizerError(_nothing(folder))
    kind = _class(folder, config)
    space = {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space"))}
    document: dict[str, Any] = {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {**space, "trim_offsets": True, "use_regex": True},
        "decoder": {**space, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": _object(folder / "vocab.json"),
            "merges": _merges(folder / "merges.txt"),
        },
    }
    if kind in LIKE_QWEN2:
        split = {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated"}
        document["normalizer"] = {"type": "NFC"}
        document["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [
                {**split, "invert": False},
                {**document["pre_tokenizer"], "use_regex": False},
            ],
        }
    _name_defaults(kind, document["model"]["vocab"], names)
    document["post_processor"] = _template(document, config, names)
    return document


def _class(folder: Path, config: Json) -> str:
    kind = config.get("tokenizer_class")
    if not isinstance(kind, str):
        model = _object(folder / "config.json").get("model_type")
        kind = CLASS_OF_MODEL.get(model) if isinstance(model, str) else None
    kind = (kind or "").removesuffix("Fast")
    if kind in LIKE_GPT2 + LIKE_QWEN2:
        return kind
    raise TokenizerError(
        f"{folder} has vocab.json and merges.txt, and tokenizer class {kind!r:.80} does not tell "
        f"how a text is cut into words; known are {', '.join(LIKE_GPT2 + LIKE_QWEN2)}. A "
        "tokenizer.json tells it: transformers' save_pretrained writes one"
    )


def _name_defaults(kind: str, vocabulary: Json, names: dict[str, str]) -> None:
    """What the classes name when the files name nothing."""
    for role in ("eos", "unk", "pad") if kind in LIKE_QWEN2 else ("bos", "eos", "unk"):
        if "<|endoftext|>" in vocabulary:
            names.setdefault(f"{role}_token", "<|endoftext|>")


def _template(document: Json, config: Json, names: dict[str, str]) -> Json | None:
    """add_bos_token and add_eos_token; a tokenizer.json says it in its own post-processor."""
    added = {t["content"]: t["id"] for t in _added({}, document["model"]["vocab"], [], names)}
    single: list[Json] = [{"Sequence": {"id": "A", "type_id": 0}}]
    known = {}
    for role, place in ("bos", 0), ("eos", 2):
        token = names.get(f"{role}_token")
        if token in added and config.get(f"add_{role}_token"):
            single.insert(place, {"SpecialToken": {"id": token, "type_id": 0}})
            known[token] = {"id": token, "ids": [added[token]], "tokens": [token]}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {"type": "TemplateProcessing", "single": single, "pair": pair}
    return {**template, "special_tokens": known} if known else None


def _merges(path: Path) -> list[list[str]]:
    """Lines of two tokens; not splitlines(), for which some tokens are ends of lines."""
    lines = [line.rstrip("\r") for line in load_text(path).split("\n")]
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise TokenizerError(f"{path.name}: {' '.join(pair)!r:.80} is not a pair of tokens")
    return pairs


def _nothing(folder: Path) -> str:
    other = next((name for name in OTHERS if (folder / name).exists()), None)
    if other is None:
        return f"{folder} has no tokenizer.json, nor vocab.json with merges.txt"
    return f'{folder} has only {other}, which is not read; convert it once: python -c "{CONVERT}"'
