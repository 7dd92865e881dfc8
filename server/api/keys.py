"""API keys: read from a file, compared in constant time, and read again on SIGHUP."""

import hashlib
import hmac
from pathlib import Path

from fastapi import Request

from server.api.head import header
from server.errors import InvalidKey, SettingError

WRONG = "The API key is wrong or missing; send it as 'Authorization: Bearer …'."


class Keys:
    """The digests of the keys that open the door; without a file it is open."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._digests: list[bytes] = []
        self.read()

    def read(self) -> None:
        """Take the keys that the file has now; a file that cannot be read changes nothing."""
        if self._path is None:
            return
        try:
            lines = self._path.read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"The key file {self._path} cannot be read: {error}.") from None
        if not lines:
            raise SettingError(f"The key file {self._path} has no key.")
        self._digests = [_digest(line) for line in lines]

    @property
    def needed(self) -> bool:
        return self._path is not None

    def check(self, said: str) -> str:
        """The salt of the key that the header `said`: its holder shares pages with nobody else."""
        if not self.needed:
            return ""
        scheme, _, key = said.partition(" ")
        digest = _digest(key.strip())
        known = [hmac.compare_digest(digest, one) for one in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise InvalidKey(WRONG)
        return hashlib.sha256(b"salt" + digest).hexdigest()[:16]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


async def known(request: Request) -> str:
    """The dependency of every route that needs a key: gives the caller's salt."""
    keys: Keys = request.app.state.front.keys
    return keys.check(header(request.scope, b"authorization"))
