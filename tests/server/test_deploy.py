"""The container without a container engine: schema, lint, locks, and a rehearsal of its steps."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from server.config import Settings
from server.options import options
from tests.server.tiny import make

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("cpu", "cuda")


def tool(name: str) -> str:
    found = shutil.which(name, path=str(BIN)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
    return found


def test_the_compose_file_keeps_its_schema() -> None:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    got = subprocess.run(
        [*command, str(ROOT / "docker-compose.yml")], capture_output=True, text=True, check=False
    )
    assert got.returncode == 0, got.stdout


def test_the_dockerfile_has_no_lint() -> None:
    got = subprocess.run(
        [tool("hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert got.returncode == 0, got.stdout


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_each_service_is_locked_down(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["user"] == "10001:10001"
    assert service["tmpfs"]
    assert service["pids_limit"] <= 1024
    assert "mem_limit" in service
    assert service["ports"] == ["${ADDRESS:-127.0.0.1}:${PORT:-8000}:8000"]
    assert all("docker.sock" not in volume for volume in service["volumes"])
    models = [volume for volume in service["volumes"] if "/models" in volume]
    assert [volume.endswith(":ro") for volume in models] == [True]
    assert "/health/ready" in service["healthcheck"]["test"][-1]
    assert service["healthcheck"]["start_period"] == "600s"
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > float(service["environment"]["KVIST_SHUTDOWN_TIMEOUT"]) + Settings().drain_lag


def test_one_service_has_the_gpu_and_one_needs_none() -> None:
    services = COMPOSE["services"]
    gpu = services["kvist"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpu == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert "deploy" not in services["kvist-cpu"]
    assert [services[name]["profiles"] for name in services] == [["gpu"], ["cpu"]]
    for service, target in (("kvist", "cuda"), ("kvist-cpu", "cpu")):
        assert services[service]["build"]["target"] == target
        assert re.search(rf"^FROM \S+ AS {target}$", DOCKERFILE, re.M)


def test_every_variable_of_ours_is_a_setting() -> None:
    known = {f"KVIST_{one.name.upper()}" for one in options()}
    said = set(re.findall(r"\b(KVIST_[A-Z_]+)=", DOCKERFILE))
    for service in COMPOSE["services"].values():
        said |= {name for name in service["environment"] if name.startswith("KVIST_")}
    assert said
    assert said <= known


def test_images_run_as_nobody_in_particular() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)
    for target in TARGETS:
        stage = next(one for one in stages if re.match(rf"\S+ AS {target}\n", one))
        assert stage.rstrip().endswith("USER 10001:10001")
    assert "ADD " not in DOCKERFILE
    assert "curl" not in DOCKERFILE


@pytest.mark.parametrize("target", TARGETS, ids="of {}".format)
def test_every_wheel_is_pinned_with_its_hash(target: str) -> None:
    """T48: and nothing is in the images that the project does not know."""
    lines = (ROOT / "deploy" / f"requirements-{target}.txt").read_text().splitlines()[1:]
    pinned = dict(
        line.replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().lower().splitlines()
        if "==" in line
    )
    names = set()
    for line in lines:
        found = re.fullmatch(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert found, line
        name, version = found[1], found[2].removesuffix("+cpu")
        names.add(name)
        if not name.startswith(("nvidia-", "cuda-")):
            assert pinned[name] == version, "run deploy/lock.py again"
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional")[0]
    wanted = set(re.findall(r'^    "([a-z_]+)>=', project.replace("_", "-"), re.M))
    assert wanted - {"triton"} <= names
    assert ("triton" in names) == (target == "cuda")
    assert "python-multipart" not in names


def locked(target: str) -> dict[str, str]:
    """Versions by name, as the image gets them."""
    lines = (ROOT / "deploy" / f"requirements-{target}.txt").read_text().splitlines()[1:]
    pairs = [line.split(" ")[0].split("==") for line in lines]
    return {name: version.partition("+")[0] for name, version in pairs}


@pytest.mark.parametrize("target", TARGETS, ids="of {}".format)
def test_the_lock_is_closed(target: str) -> None:
    """T48: whatever a locked package needs is locked too, in a version that it takes."""
    versions, seen = locked(target), set()
    names = ["kvist"]
    for name in names:
        seen.add(name)
        for line in distribution(name).requires or []:
            need = Requirement(line)
            key = canonicalize_name(need.name)
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            if key == "triton" and target == "cpu":
                continue
            assert need.specifier.contains(versions[key]), f"{name} needs {line}"
            names += [key] if key not in names else []
    of_gpus = {name for name in versions if name.startswith(("nvidia-", "cuda-"))}
    assert set(versions) - of_gpus == seen - {"kvist"}, "nothing is locked that nobody needs"


@pytest.mark.parametrize("target", TARGETS, ids="of {}".format)
def test_the_bill_of_materials_is_the_lock(target: str) -> None:
    """G16: each wheel once, with its version, hash and licence."""
    command = [sys.executable, str(ROOT / "deploy" / "bill.py"), target]
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6")
    lines = (ROOT / "deploy" / f"requirements-{target}.txt").read_text().splitlines()[1:]
    parts = made["components"]
    assert lines == [
        f"{one['name']}=={one['version']} --hash=sha256:{one['hashes'][0]['content']}"
        for one in parts
    ]
    assert len({one["bom-ref"] for one in parts}) == len(lines)
    free = [one["name"] for one in parts if not one["name"].startswith(("nvidia-", "cuda-"))]
    assert not set(free) - {one["name"] for one in parts if one.get("licenses")}


@pytest.mark.parametrize("target", TARGETS, ids="of {}".format)
def test_known_holes_are_behind_us(target: str) -> None:
    """The least versions of the reliability contract."""
    versions = locked(target)
    for name, least in (
        ("starlette", "1.0.1"), ("h11", "0.16"), ("jinja2", "3.1.6"), ("torch", "2.11"),
    ):  # fmt: skip
        assert Version(versions[name]) >= Version(least), name
    assert not {"python-multipart", "transformers", "ray"} & set(versions)


@pytest.mark.slow
def test_the_image_can_be_rehearsed(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make(tmp_path_factory.mktemp("image") / "tiny")
    got = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "rehearse.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert got.returncode == 0, got.stdout + got.stderr
    assert "served as" in got.stdout
