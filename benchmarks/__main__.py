"""`make bench`: some minutes of numbers on the embedded model, each ending in a JSON line."""

import subprocess
import sys

CHOSEN = (
    ("benchmarks.limits",),
    ("benchmarks.latency", "--prompts", "16", "256", "--batches", "1", "8"),
    ("benchmarks.throughput", "--clients", "1", "16", "64", "--rates", "4"),
    ("benchmarks.scheduler",),
)


def main() -> int:
    for module, *flags in CHOSEN:
        print(f"\n── {module} {' '.join(flags)}", flush=True)
        status = subprocess.run([sys.executable, "-m", module, *flags], check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
