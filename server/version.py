"""The version, as the distribution says it."""

from importlib.metadata import PackageNotFoundError, version


def _version() -> str:
    try:
        return version("kvist")
    except PackageNotFoundError:  # run from a copied tree
        return "unknown"


VERSION = _version()
