"""Who reads which page: reference counts, the prefix index, eviction. Integers only.

A page is in one of three states, and the three numbers add up to all there are:

    free     nobody reads it, nothing worth keeping is in it
    cached   nobody reads it, but it is published: the next equal prefix finds it
    live     somebody reads it, or did when a step that is still in flight was launched

A full page is published under a digest of everything that decides its contents: the digest of the
page before it (so the whole prefix, down to the salt at its root) and its own tokens. SHA-256, so
that nobody can make two prefixes meet. What is published never changes.

Pages dropped while steps are in flight stay live until the newest of those has ended, because it
may still write them. Who calls this keeps two rules: publish only what an ended step has written,
and write only pages that are `own`.
"""

from array import array
from collections.abc import Iterable
from hashlib import sha256


def root(salt: str) -> bytes:
    """Where the chain of a prompt under this salt begins. Hashed twice: what `link` hashes is
    longer than a digest, so no salt, which clients choose, can be the bytes of a page."""
    return sha256(sha256(salt.encode("utf-8", "surrogatepass")).digest()).digest()


def link(parent: bytes, tokens: Iterable[int]) -> bytes:
    """The digest of a full page that follows the page, or the root, `parent`."""
    return sha256(parent + array("i", tokens).tobytes()).digest()


class Pages:
    """Hands out page numbers 0 … count-1. Every call costs O(1) a page."""

    def __init__(self, count: int, size: int, *, caching: bool = True) -> None:
        if count < 1 or size < 1:
            raise ValueError(f"{count} pages of {size} tokens: both must be at least 1")
        self.count, self.size, self.caching = count, size, caching
        self._references = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self._idle: dict[int, None] = {}  # cached pages, the longest unused first
        self._digest: list[bytes | None] = [None] * count  # under which a page is published
        self._index: dict[bytes, int] = {}  # and the way back
        self._limbo: list[dict[int, None]] = []  # a step in flight: what was dropped since

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._idle)

    @property
    def live(self) -> int:
        return self.count - self.free - self.cached

    @property
    def available(self) -> int:
        """How many `take` can give."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page of one's own, evicting the longest unused cached one if none is free."""
        if self._free:
            page = self._free.pop()
        else:
            page = self._oldest()
            del self._idle[page]
            del self._index[self._digest[page] or b""]
            self._digest[page] = None
        self._references[page] = 1
        return page

    def _oldest(self) -> int:
        return next(iter(self._idle))

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest published chain; they are pinned for the caller by this."""
        found = []
        for digest in digests:
            page = self._index.get(digest)
            if page is None:
                break
            self._pin(page)
            found.append(page)
        return found

    def shared(self, digests: Iterable[bytes]) -> int:
        """How many of these, from the first on, somebody reads: to match them uses up nothing."""
        count = 0
        for digest in digests:
            page = self._index.get(digest)
            if page is None or not self._references[page]:
                break
            count += 1
        return count

    def _pin(self, page: int) -> None:
        if not self._references[page]:
            self._idle.pop(page, None)
            for dropped in self._limbo:
                dropped.pop(page, None)
        self._references[page] += 1

    def share(self, pages: Iterable[int]) -> None:
        """One more reader of pages that have one."""
        for page in pages:
            self._references[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One reader fewer. Give a chain's end first: it is then also evicted first."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page]:
                continue
            if self._limbo:
                self._limbo[-1][page] = None
            else:
                self._settle(page)

    def _settle(self, page: int) -> None:
        if self._digest[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def own(self, page: int, readers: int = 1) -> bool:
        """Whether nobody else can read it; a single reader may then write it."""
        return self._references[page] == readers and self._digest[page] is None

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find a full page. Of two with equal contents the first stays the known one."""
        if self.caching and digest not in self._index and self._digest[page] is None:
            self._index[digest] = page
            self._digest[page] = digest

    def reset(self) -> None:
        """Forget all prefixes; who reads them goes on."""
        for page in self._index.values():
            self._digest[page] = None
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)
        self._index.clear()

    def launched(self) -> None:
        """A step went off: what is dropped from now on, it may still use."""
        self._limbo.append({})

    def ended(self) -> None:
        """The oldest step in flight is over. What a younger one may use stays."""
        for page in self._limbo.pop(0):
            self._settle(page)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise unless the books are right, given the page tables of everyone who reads."""
        count, digest = [0] * self.count, self._digest
        for table in tables:
            for page in table:
                count[page] += 1
        limbo = [page for dropped in self._limbo for page in dropped]
        unread = [*self._free, *self._idle, *limbo]
        _hold(count == self._references, "a page has other readers than it counts")
        _hold(len(unread) == len(set(unread)), "a page is free, cached or dropped twice")
        _hold(len(unread) == count.count(0), "a page is lost")
        _hold(not any(count[page] for page in unread), "a page that is read is to be given away")
        _hold(not any(digest[page] for page in self._free), "a free page is published")
        _hold(all(digest[page] for page in self._idle), "a cached page is not published")
        _hold(len(self._index) == self.count - digest.count(None), "a published page is lost")
        right = all(digest[page] == known for known, page in self._index.items())
        _hold(right, "the prefix index leads to another page")


def _hold(condition: bool, sentence: str) -> None:
    if not condition:
        raise RuntimeError(f"The page books are wrong: {sentence}.")
