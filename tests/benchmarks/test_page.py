"""The page of numbers is what its script makes of the results that were kept, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page
from benchmarks.harness import RESULTS

RESULT: dict[str, Any] = {
    "benchmark": "compare",
    "shape": "llama-0.5b",
    "device": "Some CPU",
    "cores": 2,
    "load": 0.04,
    "python": "3.12.1",
    "torch": "2.13.0",
    "versions": {"ctranslate2": "4.8.5", "gguf": None},
    "commit": "abc1234",
    "command": "-m benchmarks.compare",
    "limits": {"2": {"read": 2e10, "float32": 3e11, "int8": 1.2e12}},
    "missing": {"onnxruntime": "onnxruntime-genai is not installed"},
    "rows": [
        {"case": "decode", "engine": "kvist", "tok/s": 31.4, "ratio": None, "note": None},
        {"case": "decode", "engine": "ctranslate2", "tok/s": 25.0, "ratio": 1.26, "note": None},
    ],
}


def test_the_page_in_the_docs_is_what_is_generated() -> None:
    assert page.PAGE.read_text() == page.page(page.kept())


def test_every_number_of_a_result_is_on_the_page() -> None:
    text = page.page([RESULT])
    limits = ("2 threads: 20.0 GB/s", "1,200 int8")
    for said in ("31.4", "1.26", *limits, "ctranslate2 4.8.5", "abc1234"):
        assert said in text
    assert "- onnxruntime: onnxruntime-genai is not installed" in text
    assert "note" not in text  # a column of nothing
    assert "disturbed" not in text
    assert "disturbed" in page.page([RESULT | {"disturbed": True}])


def test_the_order_is_that_of_the_table_of_contents(tmp_path: Path) -> None:
    other = RESULT | {"benchmark": "latency", "shape": None}
    for name, result in (("a", other), ("b", RESULT)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = page.page(page.kept(tmp_path))
    assert found == page.page([RESULT, other])
    heads = ["## Compare", "### llama-0.5b, at abc1234", "## Latency", "### Some CPU, at abc1234"]
    assert [line for line in found.splitlines() if line.startswith("##")] == heads


def test_results_of_one_benchmark_share_its_explanation() -> None:
    other = RESULT | {"label": "one thread", "picture": "x.png", "said": ["It is so."]}
    text = page.page([RESULT, other])
    assert text.count(page.NOTES["compare"]) == 1
    assert "### llama-0.5b, one thread" in text
    assert "![llama-0.5b, one thread](../benchmarks/results/x.png)" in text
    assert "- It is so." in text


def test_every_picture_of_the_page_is_kept() -> None:
    for result in page.kept():
        assert "picture" not in result or (RESULTS / result["picture"]).exists()


def test_no_result_is_said() -> None:
    assert page.EMPTY in page.page([])


def test_check_fails_on_another_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["page", "--check"])
    monkeypatch.setattr(page, "PAGE", tmp_path / "performance.md")
    page.PAGE.write_text("by hand")
    with pytest.raises(SystemExit, match="is not what"):
        page.main()
