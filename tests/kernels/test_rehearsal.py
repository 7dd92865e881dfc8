"""The benchmarks for GPUs, run as people run it, on a machine that cannot time a GPU."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import gpu_server, gpu_suite
from benchmarks.kernel_cases import cases
from kernels.backend import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")


def run(*flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kernels", *flags]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout[-2000:] + said.stderr[-2000:]
    record: dict[str, Any] = json.loads(said.stdout.splitlines()[-1])
    return record


@pytest.mark.slow
def test_every_case_can_be_rehearsed() -> None:
    record = run("--dry-run")
    ours = [row for row in record["rows"] if row["rival"] == "kvist"]
    assert {row["kernel"] for row in ours} == {case.kernel for case in cases()}
    assert [row for row in record["rows"] if row["note"]] == []


@pytest.mark.slow
def test_every_step_of_the_suite_can_be_rehearsed() -> None:
    for step in gpu_suite.STEPS:
        seconds, read = gpu_suite.step_time(step, dry=True)
        assert seconds > 0
        assert read > 0
    assert all(row["ratio"] for row in gpu_server.measure(dry=True))


def test_variants_are_listed_with_what_they_cost() -> None:
    rows = run("--list", "--arch", "90", "--only", "rotate")["rows"]
    assert rows
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows)
