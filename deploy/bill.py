"""What an image is made of, as a bill of materials: python deploy/bill.py cpu|cuda > kvist.cdx.json

CycloneDX 1.6: every locked wheel with its version and hash, as deploy/lock.py wrote them, and the
licence that its metadata tells where it is installed. The same lock makes the same bill.
"""

import argparse
import json
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def bill(target: str) -> dict[str, Any]:
    """The document."""
    lines = (ROOT / "deploy" / f"requirements-{target}.txt").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {"type": "application", "name": project["name"], "version": project["version"]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": ours | {"bom-ref": project["name"]} | licences("kvist")},
        "components": [component(line) for line in lines if "==" in line],
    }


def component(line: str) -> dict[str, Any]:
    """One line of the lock: name==version --hash=sha256:…"""
    pinned, _, sha256 = line.partition(" --hash=sha256:")
    name, _, version = pinned.partition("==")
    where = f"pkg:pypi/{name}@{version}"
    known = {"type": "library", "bom-ref": where, "name": name, "version": version, "purl": where}
    return known | {"hashes": [{"alg": "SHA-256", "content": sha256}]} | licences(name)


def licences(name: str) -> dict[str, Any]:
    """As the package says it; nothing where it is not installed or does not say."""
    try:
        told = metadata(name)
    except PackageNotFoundError:
        return {}
    if "License-Expression" in told:
        return {"licenses": [{"expression": told["License-Expression"]}]}
    classes = [one for one in told.get_all("Classifier") or [] if one.startswith("License ::")]
    texts = [told["License"].splitlines()[0]] if "License" in told else classes
    return {"licenses": [{"license": {"name": text.split(" :: ")[-1]}} for text in texts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("cpu", "cuda"))
    print(json.dumps(bill(parser.parse_args().target), indent=1))


if __name__ == "__main__":
    main()
