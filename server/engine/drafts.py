"""Guesses without a second model: what followed the last time that the text ended like this.

A guess is verified in one row of several tokens. Since a draw is a function of (seed, branch,
position) and of the tokens before it, taking guesses as long as they equal the draws gives exactly
the tokens that would have been drawn one at a time: drafts change the number of steps only.
"""

LONGEST, SHORTEST = 3, 2  # tokens of an ending that is looked up; longer is surer, so it goes first


class Lookup:
    """One branch's tokens, and where each ending was last followed by something. O(1) a token."""

    __slots__ = ("_after", "_tokens")

    def __init__(self, tokens: list[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        tokens = self._tokens
        for length in range(SHORTEST, min(LONGEST, len(tokens)) + 1):
            self._after[tuple(tokens[-length:])] = len(tokens)
        tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """Up to `count` tokens; a repetition that the end cuts off is taken to go on."""
        tokens = self._tokens
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            at = self._after.get(tuple(tokens[-length:]))
            if at is not None:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(count)]
        return []
