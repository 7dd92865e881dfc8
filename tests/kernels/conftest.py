"""Tests marked `interpreter` run in one child process, where Triton interprets its kernels.

Triton decides when it is imported, so one process either compiles kernels or interprets them.
The test's function and its parameters go to the child by name and by pickle; the rest is usual.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import pytest

_child: list[ProcessPoolExecutor] = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    from kernels.backend import INTERPRETED

    if INTERPRETED or not pyfuncitem.get_closest_marker("interpreter"):
        return None
    pytest.importorskip("triton", reason="Triton is not installed here, so nothing interprets it")
    names = pyfuncitem._fixtureinfo.argnames
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    _interpreter().submit(
        _run, pyfuncitem.module.__name__, pyfuncitem.originalname, arguments
    ).result()
    return True


def pytest_sessionfinish() -> None:
    while _child:
        _child.pop().shutdown()


def _interpreter() -> ProcessPoolExecutor:
    if not _child:
        _child.append(ProcessPoolExecutor(1, get_context("spawn"), _interpret))
        os.environ["TRITON_INTERPRET"] = "1"  # inherited, and read before `_interpret` could set it
        try:
            _child[0].submit(os.getpid).result()
        finally:
            del os.environ["TRITON_INTERPRET"]
    return _child[0]


def _interpret() -> None:
    import torch

    torch.set_num_threads(1)


def _run(module: str, function: str, arguments: dict[str, Any]) -> None:
    getattr(import_module(module), function)(**arguments)
