"""Every shipped variant of every kernel, compiled for GPUs that need not be here."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

import kernels
from kernels import backend
from kernels.backend import KERNELS, Probe, call, differs, pretend
from kernels.config import Config, Key, configured, runs
from tests.kernels.aot import DEVICES, compile_all, launches
from tests.kernels.variants import CPU, variants

for file in Path(kernels.__file__).parent.glob("*.py"):
    import_module(f"kernels.{file.stem}")

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed here")
CASES = [
    pytest.param(name, i, arch, marks=[pytest.mark.slow] if i else [], id=f"{name}-{i}-sm{arch}")
    for name in sorted(KERNELS)
    for i in range(len(variants(name).probes))
    for arch in variants(name).archs
]


@pytest.mark.parametrize(("name", "i", "arch"), CASES)
def test_a_variant_compiles_within_its_means(name: str, i: int, arch: int) -> None:
    rule = variants(name)
    probe = rule.probes[i]
    made = list(compile_all(launches(KERNELS[name], probe, arch), arch))
    assert made, f"{name} launched nothing on sm_{arch}: it fell back to its twin"
    narrow = rule.narrow or probe.sinks  # a block reads its heads' sinks once, as they lie
    faults = [fault for one in made for fault in one.faults(one.name in rule.copies, narrow)]
    assert faults == []
    assert {one.name for one in made} >= set(rule.copies) - {"_shared" if probe.window else ""}


def test_every_kernel_is_among_them() -> None:
    """Paged and shared attention; turning, norming and writing; copies; and what follows."""
    pages, norms = {"attention", "store", "rotate", "copy_pages"}, {"rms_norm", "layer_norm"}
    norms |= {f"add_{norm}" for norm in norms}
    draws = {"sample", "penalise", "top_logprobs"}
    assert pages | norms | draws | {"activate", "gate", "linear", "experts"} == set(KERNELS)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_no_kernel_falls_back_on_a_gpu(name: str) -> None:
    for probe in variants(name).probes:
        with pretend(DEVICES[90]) as kept:
            for trial in KERNELS[name].trial(probe):
                before = len(kept)
                KERNELS[name](*trial.args, **trial.kwargs)
                assert len(kept) > before, f"{name} launched nothing for {trial}"


@pytest.mark.parametrize("name", sorted(KERNELS))
@pytest.mark.parametrize("arch", DEVICES)
def test_every_launch_is_configured(name: str, arch: int) -> None:
    """By its table: what a launch does not say, Triton's next version may choose otherwise."""
    for probe in variants(name).probes:
        for made in launches(KERNELS[name], probe, arch):
            assert {"num_warps", "num_stages"} <= made.options.keys(), made


def test_an_architecture_may_have_a_line_of_its_own() -> None:
    lines: dict[Key, Config] = {("gate",): Config(1024, 4), (90, "gate"): Config(2048, 8)}
    for arch, device in DEVICES.items():
        with pretend(device):
            found = configured(lines, CPU, "gate")
        assert found == lines[(90, "gate") if arch == 90 else ("gate",)]
        assert runs(found) == {"num_warps": found.warps, "num_stages": 1}
    with pytest.raises(KeyError):
        configured(lines, CPU, "activate")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", sorted(KERNELS))
def test_a_kernel_passes_its_own_trial(name: str) -> None:
    kernel = KERNELS[name]
    for trial in kernel.trial(Probe(CPU, torch.float16)):
        ways = call(kernel.triton, trial), call(kernel.twin, trial)
        assert differs(*ways, call(kernel.twin, trial, exactly=True)) == ""
