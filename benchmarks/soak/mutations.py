"""Seeded mutations of valid requests: values, keys, types, sizes, and the bytes themselves."""

import json
import random
from typing import Any

VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "tiny", "prompt": "Hello", "max_tokens": 3}),
    (
        "/v1/completions",
        {
            "prompt": ["a", "b"], "max_tokens": 2, "n": 2, "logprobs": 1, "echo": True,
            "stop": ["x"], "temperature": 0.5, "top_p": 0.9, "seed": 7, "logit_bias": {"5": 1},
            "user": "me",
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": [1, 2, 3], "max_tokens": 3, "stream": True, "top_k": 5, "min_p": 0.1,
            "stream_options": {"include_usage": True}, "stop_token_ids": [9], "priority": 1,
            "allowed_token_ids": [1, 2], "bad_words": ["no"], "return_token_ids": True,
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": "x", "max_tokens": 3, "num_beams": 2, "length_penalty": 1.0,
            "early_stopping": True, "beam_stream": {"mode": "final"}, "prompt_logprobs": 1,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3,
            "logprobs": True, "top_logprobs": 2, "n": 2, "presence_penalty": 1,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Well"},
            ],
            "max_tokens": 3, "stream": True, "continue_final_message": True,
            "response_format": {"type": "text"}, "chat_template_kwargs": {"a": 1},
        },
    ),
    ("/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64"}),
    ("/v1/tokenize", {"prompt": "hej", "return_token_strs": True}),
    ("/v1/detokenize", {"tokens": [104, 101]}),
]  # fmt: skip
WORDS = ["", "x", "\x00", "\ud7ff", "é" * 99, "🌱", "{{7*7}}", "../..", "<eos>", "a" * 5000, "null"]
NUMBERS = [0, 1, -1, 2, 258, 259, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e300, 1e-300]
EXTRA = [
    "tools",
    "guided_json",
    "prompt_embeds",
    "chat_template",
    "stop",
    "x",
    "__proto__",
    "n",
    "",
]
BYTES = [b"NaN", b"1e999", b"[" * 200, b'"', b"\\ud800", b"9" * 5000]


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(WORDS)
    if kind == 3:
        return rng.choice([None, True, False])
    if kind == 4:
        return rng.randrange(-5, 300)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind == 6:
        return {rng.choice(WORDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [value(rng, 3)] * rng.choice([1, 5, 200])


def places(box: Any) -> list[tuple[Any, Any]]:
    """Every container in the tree, with each of its keys."""
    found: list[tuple[Any, Any]] = []
    keys = list(box) if isinstance(box, dict) else range(len(box))
    for key in keys:
        found.append((box, key))
        if isinstance(box[key], dict | list):
            found += places(box[key])
    return found


def mutate_tree(rng: random.Random, body: dict[str, Any]) -> None:
    box, key = rng.choice(places(body))
    change = rng.randrange(6)
    if change == 0:
        del box[key]
    elif change == 1:
        body[rng.choice(EXTRA)] = value(rng)
    elif change == 2 and isinstance(box[key], list):
        box[key] = box[key] * rng.choice([0, 2, 300])
    elif change == 3 and isinstance(box[key], str):
        at = rng.randrange(len(box[key]) + 1)
        box[key] = box[key][:at] + rng.choice(WORDS) + box[key][at:]
    else:
        box[key] = value(rng)


def mutate_bytes(rng: random.Random, raw: bytes) -> bytes:
    change = rng.randrange(5)
    at = rng.randrange(len(raw) + 1)
    if change == 0:
        return raw[:at]
    if change == 1:
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    if change == 2:
        return raw[:at] + rng.choice(BYTES) + raw[at:]
    if change == 3:
        return raw[:at] + raw[rng.randrange(len(raw)) :]
    return raw.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))


def mutation(seed: int) -> tuple[str, bytes]:
    """A path and a body; the same for the same seed."""
    rng = random.Random(seed)
    path, body = rng.choice(VALID)
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if body:
            mutate_tree(rng, body)
    raw = json.dumps(body).encode()
    return path, mutate_bytes(rng, raw) if rng.random() < 0.25 else raw
