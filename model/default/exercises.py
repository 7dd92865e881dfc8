"""Made-up texts that teach, and later show, simple behaviour: counting, patterns, brackets, sums.

A small model learns them fully, and that makes them good to look at: one can point at the
attention that finds the previous number. Everything is drawn from one seed.
"""

import sys
from collections.abc import Callable, Iterator
from random import Random

TEXTS = 9_000


def _list(words: str) -> list[str]:
    return words.split()


ONES = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
TENS = _list("_ _ twenty thirty forty fifty sixty seventy eighty ninety")
LANGUAGES = {
    "French": _list("zéro un deux trois quatre cinq six sept huit neuf dix onze douze"),
    "German": _list("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf"),
    "Swedish": _list("noll ett två tre fyra fem sex sju åtta nio tio elva tolv"),
}
CIRCLES = [
    _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    _list("January February March April May June July August September October November December"),
    list("abcdefghijklmnopqrstuvwxyz"),
    _list("spring summer autumn winter"),
]
WORDS = _list("red blue green apple pear cat dog sun moon north south left right yes no tick tock")
PAIRS = ["()", "[]", "{}", "<>"]
MODULES = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
COMMON = _list("os sys re io time json math random string types collections functools itertools")


def exercises(seed: int, texts: int = TEXTS) -> Iterator[str]:
    random = Random(seed)  # noqa: S311 - reproducible texts, not secrets
    kinds = [kind for kind, weight in KINDS.items() for _ in range(weight)]
    for _ in range(texts):
        yield random.choice(kinds)(random) + "\n"


def english(number: int) -> str:
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def _count(random: Random) -> str:
    """By ones, mostly from one: the first thing that anybody tries."""
    start = random.choice([0, 1, 1, 1, random.randrange(100), random.randrange(1000)])
    numbers = range(start, start + random.randrange(12, 60))
    return _join(random, map(str, numbers))


def _steps(random: Random) -> str:
    step = random.choice([-5, -2, -1, 2, 2, 3, 5, 10, 10, 100])
    start = (
        random.choice([0, step, random.randrange(100)]) if step > 0 else random.randrange(40, 99)
    )
    length = random.randrange(8, 24)
    return _join(random, map(str, range(start, max(start + step * length, -1), step)))


def _join(random: Random, items: "Iterator[str] | map[str] | list[str]") -> str:
    kind = random.choice([", ", ", ", ", ", " ", "\n", "[]"])
    return f"[{', '.join(items)}]" if kind == "[]" else kind.join(items)


def _circle(random: Random) -> str:
    circle = random.choice(CIRCLES)
    start = random.randrange(len(circle)) if random.random() < 0.5 else 0
    return _join(
        random, [circle[(start + i) % len(circle)] for i in range(random.randrange(5, 30))]
    )


def _pattern(random: Random) -> str:
    tokens = [*WORDS, *"ABCXYZ0123456789"]
    unit = random.sample(tokens, random.randrange(2, 6))
    return _join(random, unit * random.randrange(3, 9))


def _brackets(random: Random) -> str:
    """Opened at random, closed in order."""
    open_, text = [random.choice(PAIRS)], ""
    text += open_[-1][0]
    for _ in range(random.randrange(4, 30)):
        if open_ and random.random() < 0.45:
            text += open_.pop()[1]
        else:
            open_.append(random.choice(PAIRS))
            text += open_[-1][0]
    return text + "".join(pair[1] for pair in reversed(open_))


def _sums(random: Random) -> str:
    top = random.choice([10, 20, 100])
    lines = []
    for _ in range(random.randrange(4, 12)):
        a, b = random.randrange(top), random.randrange(top)
        sign, result = random.choice(
            [("+", a + b), ("-", a - b), ("*", a * b)][: 3 if top < 20 else 2]
        )
        lines.append(f"{a} {sign} {b} = {result}")
    return "\n".join(lines)


def _times(random: Random) -> str:
    factor = random.randrange(1, 13)
    return "\n".join(f"{i} * {factor} = {i * factor}" for i in range(1, random.randrange(8, 13)))


def _words(random: Random) -> str:
    form = random.choice(["{0} = {1}", "{1} is {0}", "{0}: {1}"])
    start, stop = random.choice([(0, 13), (0, 100), (1, 21)])
    numbers = list(range(start, stop))
    if random.random() < 0.5:
        random.shuffle(numbers)
    return "\n".join(form.format(n, english(n)) for n in numbers[: random.randrange(6, 26)])


def _translate(random: Random) -> str:
    language, words = random.choice(list(LANGUAGES.items()))
    numbers = random.sample(range(13), random.randrange(4, 13))
    return "\n".join(f"{ONES[n]} is {words[n]} in {language}" for n in numbers)


def _count_words(random: Random) -> str:
    start = random.choice([0, 1, 1, random.randrange(60)])
    return _join(random, [english(n) for n in range(start, start + random.randrange(8, 30))])


def _imports(random: Random) -> str:
    """Several modules in a line, which the library itself seldom does and everybody types."""
    names = random.sample(COMMON, len(COMMON)) + random.sample(MODULES, 20)
    names = list(dict.fromkeys(names))
    counts = [random.choice([1, 2, 2, 3, 4]) for _ in range(random.randrange(1, 6))]
    return "\n".join("import " + ", ".join(names.pop(0) for _ in range(count)) for count in counts)


KINDS: dict[Callable[[Random], str], int] = {
    _count: 8,
    _steps: 3,
    _circle: 3,
    _pattern: 3,
    _brackets: 2,
    _sums: 2,
    _times: 1,
    _words: 2,
    _translate: 2,
    _count_words: 2,
    _imports: 4,
}
