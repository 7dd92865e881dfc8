"""`make bench`: three minutes of numbers on the embedded model.

    python -m benchmarks [--save]

Every part shows its progress and its table, and ends in one JSON line; these stand together at the
end too. `--save` keeps the results in benchmarks/results/.
"""

import argparse
import subprocess
import sys
import time

CHOSEN = (
    "limits",
    "latency --prompts 16 256 768 --batches 1 8 --rounds 2",
    "throughput --clients 1 16 64 256 --shares 0.6 --rounds 2 --seconds 2",
    "scheduler --steps 100",
    "front --streams 1 64 --seconds 2",
)


def run(words: list[str]) -> tuple[int, str]:
    """Its status, and the last line that it printed; all else is shown as it comes."""
    command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
            last = line.strip()
    return process.returncode, last


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="keep the results")
    keep = ["--save"] * parser.parse_args().save
    began, said = time.monotonic(), []
    for number, chosen in enumerate(CHOSEN, 1):
        print(f"\n── {number} of {len(CHOSEN)}: {chosen}", flush=True)
        status, last = run([*chosen.split(), *keep])
        if status:
            return status
        said.append(last)
    print(f"\n── {time.monotonic() - began:.0f} seconds in all", *said, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
