"""Tiny tokenizers of every kind, trained on the spot, in the shapes that models come in."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 1234567 o'clock, and they'll sleep.\n" * 3,
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass    # 12 345\n" * 3,
    "aaaaaaaa aaaa aa AAAA   AAAAAAA bbbb\n\n\n\n        !!!!!!!! ????\r\n\r\n====" * 3,
    "Größe, naïve café, Ångström, straße, ÉCOLE; Привет, как дела? Γειά σου Κόσμε",
    "日本語のテキスト、漢字とかな。中文字符测试，标点。한국어 텍스트 مرحبا بالعالم हिन्दी",
    "👍🏽 👨‍👩‍👧‍👦 🇸🇪 e\u0301 a\u0308 \u00a0\u3000 x\u200dy don't we've HE'LL I'M",
    "<think>so</think> <|im_start|>user\nhello<|im_end|> </s> <s> [INST] <mask>",
] * 4

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{ENDS}"
QWEN2 = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{ENDS}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{ENDS}"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{ENDS}"
)
HOUSE = (  # the embedded model's
    r" ?[\p{L}_]+[.(]?| ?\p{N}| ?[^\s\p{L}\p{N}_]+(?:\n+ *)?|\n+[ \t]*|[ \t]+(?!\S)|\s+"
)
POSSESSIVE = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+{ENDS}"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"

Tokenizer = tokenizers.Tokenizer
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]


def added(content: str, special: bool = True, **flags: bool) -> AddedToken:
    return AddedToken(content, special=special, **{"normalized": False, **flags})


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(
    cut: Any = None,
    *,
    size: int = 700,
    space: bool = False,
    normalizer: Any = None,
    letters: list[str] | None = None,
) -> Tokenizer:
    """A byte-level BPE: `cut` is what comes before ByteLevel, or nothing for GPT-2's own."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=cut is None)
    steps = [] if cut is None else cut if isinstance(cut, list) else [cut]
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if letters is None else letters,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens([added(token) for token in SPECIAL])
    return made


def edited(made: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    document = json.loads(made.to_str())
    change(document)
    return Tokenizer.from_str(json.dumps(document))


def all_pairs(document: dict[str, Any]) -> None:
    """Merges as they are derived from tokens with ranks: every pair that makes a token."""
    model = document["model"]
    rank = {a + b: i for i, (a, b) in reversed(list(enumerate(model["merges"])))}
    letters = {token for token in model["vocab"] if len(token) == 1}
    known = letters | rank.keys()
    halves = {z: [(z[:i], z[i:]) for i in range(1, len(z))] for z in sorted(rank, key=rank.get)}  # type: ignore[arg-type]
    model["merges"] = [
        list(pair) for pairs in halves.values() for pair in pairs if set(pair) <= known
    ]
    model["ignore_merges"] = True


def scattered(document: dict[str, Any]) -> None:
    """Ids in no order at all, in front of them the special tokens."""
    vocabulary = document["model"]["vocab"]
    size, count = len(vocabulary), len(document["added_tokens"])
    stride = next(n for n in range(size // 3, size) if _coprime(n, size))
    for token, i in vocabulary.items():
        vocabulary[token] = i * stride % size + count
    for i, token in enumerate(document["added_tokens"]):
        token["id"] = vocabulary[token["content"]] = i


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


# ── byte-level kinds ──────────────────────────────────────────────────────────────────────────


def gpt2() -> Tokenizer:
    return byte_level()


def gpt2_vocabulary() -> Tokenizer:
    """Special tokens are in the vocabulary too, where no merge makes them; ids are scattered."""
    return edited(gpt2(), scattered)


def llama3() -> Tokenizer:
    made = edited(byte_level(split(LLAMA3), size=900), all_pairs)
    made.add_tokens([added("<|begin_of_text|>")])
    bos = made.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", bos)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def qwen2() -> Tokenizer:
    made = byte_level(split(QWEN2), normalizer=normalizers.NFC())
    made.add_tokens([added(token, special=False) for token in ("<think>", "</think>", "<a><b>")])
    return made


def qwen35() -> Tokenizer:
    return byte_level(split(QWEN35), normalizer=normalizers.NFC())


def o200k() -> Tokenizer:
    return byte_level(split(O200K, "removed", invert=True))


def neox() -> Tokenizer:
    """Runs of spaces are added tokens, searched for in the normalised text (there is no other)."""
    made = byte_level(space=True)
    made.add_tokens([added(" " * n, special=False, normalized=True) for n in range(24, 1, -1)])
    return made


def starcoder() -> Tokenizer:
    return byte_level_digits(individual=True)


def byte_level_digits(individual: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual), level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=level.alphabet(), show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def house() -> Tokenizer:
    return byte_level(split(HOUSE))


def phi3_flags() -> Tokenizer:
    """Added tokens that swallow blanks, or that must stand alone."""
    made = byte_level(split(QWEN2))
    made.add_tokens([added("<|user|>", rstrip=True), added("<mask>", lstrip=True)])
    made.add_tokens([added("alone", special=False, single_word=True)])
    made.add_tokens([added("both", special=False, lstrip=True, rstrip=True, single_word=True)])
    made.add_tokens([added("<|user|>x", special=False), added("!", special=False)])
    return made


def lowercase() -> Tokenizer:
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace("``", '"')]
    return byte_level(normalizer=normalizers.Sequence(steps))


PROVED = [gpt2, gpt2_vocabulary, llama3, qwen2, qwen35, o200k, neox, starcoder, house]
PROVED += [phi3_flags, lowercase]


# ── byte-level, and not to be proved ──────────────────────────────────────────────────────────


def possessive() -> Tokenizer:
    """In Oniguruma {1,3}+ is a repeated group, in Rust a possessive one."""
    return byte_level(split(POSSESSIVE))


def bloom() -> Tokenizer:
    """A class inside a class, and blanks that no alternative matches."""
    return byte_level(split(BLOOM))


def deepseek() -> Tokenizer:
    """Several steps, of which a later one sees the ends that an earlier one made."""
    return byte_level([split(r"\p{N}{1,3}"), split(r"[一-龥぀-ゟ゠-ヿ]+"), split(QWEN2)])


def digit_runs() -> Tokenizer:
    return byte_level_digits(individual=False)


def late_tokens() -> Tokenizer:
    """Added tokens that are searched for after normalisation."""
    made = byte_level(normalizer=normalizers.Lowercase())
    made.add_tokens([added("Hello", special=False, normalized=True)])
    return made


def few_letters() -> Tokenizer:
    """Bytes without a token: the library drops them."""
    return byte_level(letters=[])


def split_merges() -> Tokenizer:
    """Two pairs make one token, and other merges have ranks between theirs."""

    def change(document: dict[str, Any]) -> None:
        merges = document["model"]["merges"]
        left, right = next(m for m in merges if len(m[0]) > 1)
        merges.append([left[:1], left[1:] + right])
        document["model"]["vocab"].setdefault(left[1:] + right, len(document["model"]["vocab"]))

    return edited(gpt2(), change)


def greedy_words() -> Tokenizer:
    """ignore_merges, and a word that two tokens would spell without it."""

    def change(document: dict[str, Any]) -> None:
        document["model"]["ignore_merges"] = True
        document["model"]["vocab"]["Ġdogfox"] = len(document["model"]["vocab"])
        document["model"]["merges"] += [["dog", "fox"]]
        for token in ("dog", "fox", "dogfox"):
            vocabulary = document["model"]["vocab"]
            vocabulary.setdefault(token, len(vocabulary))
        document["model"]["merges"] += [["d", "o"], ["f", "o"], ["do", "g"], ["fo", "x"]]
        for token in ("do", "fo"):
            vocabulary.setdefault(token, len(vocabulary))
        document["added_tokens"] = []

    return edited(gpt2(), change)


UNPROVED = [possessive, bloom, deepseek, digit_runs, late_tokens, few_letters, split_merges]
UNPROVED += [greedy_words]


# ── kinds that are no byte-level BPE ──────────────────────────────────────────────────────────

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(normalizer: Any, pre_tokenizer: Any, decoder: Any, size: int = 800) -> Tokenizer:
    """BPE over characters, and bytes for characters that it lacks."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer, made.decoder = normalizer, decoder
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    start = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=start, limit_alphabet=90, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)

    def finish(document: dict[str, Any]) -> None:
        document["added_tokens"] = document["added_tokens"][:3]
        document["pre_tokenizer"] = None

    made = edited(made, finish)
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return made


def _unescape(strip: int) -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", strip, 0)] if strip else []))


def _bos(made: Tokenizer, single: str = "<s> $A") -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(
        single=single,
        pair="$A $B",
        special_tokens=[("<s>", made.token_to_id("<s>")), ("</s>", made.token_to_id("</s>"))],
    )
    return made


def llama2() -> Tokenizer:
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _bos(sentencepiece(normalizers.Sequence(steps), None, _unescape(1)))


def mistral() -> Tokenizer:
    space = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _bos(sentencepiece(None, space, _unescape(1)))


def gemma() -> Tokenizer:
    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    made = sentencepiece(normalizers.Replace(" ", "▁"), cut, _unescape(0))
    made.add_tokens([added(token, special=False) for token in ("\n\n", "\n", "▁▁", "<b>")])
    return _bos(made, "<s> $A </s>")


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    start = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=start, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def unigram_bytes() -> Tokenizer:
    def change(document: dict[str, Any]) -> None:
        pieces = document["model"]["vocab"]
        pieces += [[byte, -20.0] for byte in BYTES]
        document["model"]["byte_fallback"] = True
        replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]
        document["decoder"] = {"type": "Sequence", "decoders": steps}

    return edited(unigram(), change)


def bert() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    start = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=start, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def word_level() -> Tokenizer:
    """No decoder: the library joins tokens by spaces."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


OTHER = [llama2, mistral, gemma, unigram, unigram_bytes, bert, word_level]
EVERY = [*PROVED, *UNPROVED, *OTHER]


def save(made: Tokenizer, folder: Path, **files: Any) -> Path:
    """tokenizer.json, and other files by name: config_json={...} is config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    for name, content in files.items():
        path = folder / name.replace("_json", ".json")
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def texts() -> Iterator[str]:
    """What breaks tokenizers, besides random text."""
    yield from ("", " ", "a", " a", "a ", "  ", "\n", "\t \n", "\u3000x", "\x00", "\x1c\x1d x\x85y")
    yield from CORPUS[:7]
    yield from (" " * n + "x" + "\n" * n for n in (1, 2, 3, 511, 512, 513, 1023, 1024, 1025, 1700))
    yield from (
        "\t " * 600 + "\n",
        " \n" * 700 + " x",
        "x" + " " * 1025,
        " " * 513 + "1",
        "\n" * 999,
    )
    yield from ("e\u0301" * 50, "\u0301" * 200, "\u0316\u0301" * 90 + "a", "각", "각", "\u0958 ﬁ Å")
    yield from ("'S 'T 'RE 'ſ 'LL 'ﬅ ß ſs Kelvin K", "''''s", "I'M'LL'D", "it's\u2019s", "'s's 't")
    yield from ("1234567890", "1 12 123 1234", "٣٤٥ ⅷ ½ ²³ ௧௨", "a1b22c333", " 1  2   3", "१२३४")
    yield from (
        "A" * 3000,
        "aB" * 800,
        "ÀÉ" * 300,
        "ǅ ǈ ʰ ª º",
        "_" * 9 + "__init__",
        "...)))(((",
        "#!/",
    )
    yield from (
        "\ufeffx",
        "\ufdd0",
        "x\ufdd0y",
        "\U0010ffff",
        "\u200b\u200d",
        "\ue000\uf8ff",
        "\u00ad",
    )
    yield from (
        "👨‍👩‍👧‍👦" * 40,
        "🇸🇪🇳🇴",
        "👍🏽",
        "\ufffd",
        "܀ﷺ",
        "▁▁a▁",
        "▁",
        "Ġa",
        "<0x41><0x00>",
        "##ing",
    )
    yield from (
        "<|im_start|>",
        " <|im_end|> ",
        "<|im_start|><|im_end|>x<|endoftext|>",
        "<|im_<|im_end|>",
    )
    yield from ("<s>", "</s>", "a</s>b", "</s></s> </s>", "<unk>", "[SEP] x [CLS]", "<s>\n<s> <s>")
    yield from (
        "<think>a</think>",
        "<a><b><a",
        "x <mask> y",
        "<|user|>  \n z",
        "<|user|>x",
        " \n <mask><mask>",
    )
    yield from (
        "alone",
        "xalone",
        "alone.",
        " alone both  both",
        "aloneé",
        "both\n",
        "Hello hello HELLO",
    )
    yield from (
        "dogfox",
        " dogfox dog fox",
        "\n\n\n",
        "a\n\nb",
        "▁▁▁",
        "<b>",
        "!!!",
        "x" * 130 + " y",
    )
