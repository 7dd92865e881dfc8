"""Write deploy/requirements-cpu.txt and -cuda.txt: every wheel of the image, with its hash.

    python deploy/lock.py cpu|cuda [--find-links FOLDER]

Run it with the Python that the image has, on the platform that it has. The versions are those of
constraints.txt; pip only says which wheels they are, and downloads none that it need not.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent


def resolve(target: str, find_links: str | None) -> list[dict[str, Any]]:
    """What pip would install into an empty place."""
    torch = next(
        line.strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("torch==")
    )
    wanted = f"{torch}+cpu" if target == "cpu" else torch
    with tempfile.NamedTemporaryFile("r", suffix=".json") as report:
        command = [
            sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
            "--only-binary", ":all:", "--report", report.name,
            "--constraint", str(ROOT / "constraints.txt"), wanted, str(ROOT),
        ]  # fmt: skip
        command += ["--find-links", find_links] if find_links else []
        subprocess.run(command, check=True)
        installs: list[dict[str, Any]] = json.load(report)["install"]
    return installs


def lines(installs: list[dict[str, Any]]) -> list[str]:
    """name==version --hash, sorted; without ourselves."""
    found = []
    for one in installs:
        name, version = (
            one["metadata"]["name"].lower().replace("_", "-"),
            one["metadata"]["version"],
        )
        if name != "kvist":
            sha256 = one["download_info"]["archive_info"]["hashes"]["sha256"]
            found.append(f"{name}=={version} --hash=sha256:{sha256}")
    return sorted(found)


def needed(line: str, target: str) -> bool:
    """Without a GPU, Triton is 600 MB that nothing runs on."""
    return target == "cuda" or not line.startswith("triton==")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("cpu", "cuda"))
    parser.add_argument("--find-links", help="a folder with wheels that the index does not have")
    asked = parser.parse_args()
    path = HERE / f"requirements-{asked.target}.txt"
    head = "# Made by deploy/lock.py: Linux, x86-64, Python {}.{}. Do not edit.\n"
    every = lines(resolve(asked.target, asked.find_links))
    found = [line for line in every if needed(line, asked.target)]
    path.write_text(head.format(*sys.version_info[:2]) + "\n".join(found) + "\n")
    print(f"{path.name}: {len(found)} wheels")


if __name__ == "__main__":
    main()
