"""What the Dockerfile does, where no container engine runs: python deploy/rehearse.py MODEL

Installs the locked wheels of the cpu image into an empty place, by their hashes; then the source
beside them; makes everything read-only; serves from it as user 10001 with no home to write to;
asks for a completion; ends it with SIGTERM. Prints the sizes, line by line.
"""

import argparse
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
USER = 10001
SOURCE = ("pyproject.toml", "README.md", "LICENSE", "kernels", "model", "server")


def install(place: Path, model: Path) -> Path:
    """An environment as the image has it, and a model; the path of its Python."""
    shutil.copytree(model, place / "model")
    subprocess.run([_interpreter(place), "-m", "venv", str(place / "kvist")], check=True)
    python = place / "kvist" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir"]
    lock = str(ROOT / "deploy" / "requirements-cpu.txt")
    subprocess.run([*pip, "--require-hashes", "--only-binary", ":all:", "-r", lock], check=True)
    source = place / "source"
    source.mkdir()
    for name in SOURCE:
        one = ROOT / name
        if one.is_dir():
            shutil.copytree(one, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(one, source / name)
    subprocess.run([*pip, "--no-build-isolation", str(source)], check=True)
    shutil.rmtree(source)
    subprocess.run(["chmod", "-R", "a-w,a+rX", str(place)], check=True)
    return python


def _interpreter(place: Path) -> str:
    """A Python that everybody may run: one in somebody's home is copied."""
    base = Path(sys.base_prefix)
    if all(folder.stat().st_mode & 0o001 for folder in (base, *base.parents)):
        return str(base / "bin" / "python3")
    unwanted = shutil.ignore_patterns("site-packages", "test", "__pycache__", "share")
    shutil.copytree(base, place / "python", symlinks=True, ignore=unwanted)
    return str(place / "python" / "bin" / "python3")


def sizes(place: Path, most: int = 12) -> list[tuple[str, int]]:
    """What the largest packages take, in MB, and everything."""
    packages = next((place / "kvist" / "lib").glob("python*/site-packages"))
    found = {one.name: _size(one) for one in packages.iterdir()}
    largest = sorted(found.items(), key=lambda pair: -pair[1])[:most]
    rest = sum(found.values()) - sum(size for _, size in largest)
    return [*largest, ("the rest", rest), ("all", sum(found.values()))]


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(one.lstat().st_size for one in path.rglob("*") if one.is_file())


def serve(python: Path, model: Path, scratch: Path) -> None:
    """As another user, who can write nowhere but in `scratch`, as in the image's /tmp."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environ = {
        "PATH": os.environ["PATH"],
        "LD_LIBRARY_PATH": str(python.parents[2] / "python" / "lib"),  # of a copied interpreter
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "HF_HUB_OFFLINE": "1",
        "KVIST_LOG": "json",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(python), "-m", "server", "serve", str(model), "--port", str(port)]
    command += ["--pages", "256", "--threads", "1"]
    as_other = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
    server = subprocess.Popen(command, env=environ, cwd=scratch, **as_other)  # type: ignore[call-overload]
    try:
        _wait(server, f"http://127.0.0.1:{port}/health/ready")
        body = json.dumps({"prompt": "Once", "max_tokens": 8}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(json.load(answer)["usage"])
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    if status != 0:
        raise SystemExit(f"the server ended with {status}")


def _wait(server: "subprocess.Popen[bytes]", url: str) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"the server did not come up: {server.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server was not ready in 180 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a model's folder")
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kvist-image-"))
    scratch = Path(tempfile.mkdtemp(prefix="kvist-tmp-"))
    try:
        place.chmod(0o755)
        python = install(place, asked.model)
        for name, size in sizes(place):
            print(f"{size / 1e6:9.1f} MB  {name}")
        scratch.chmod(0o777)
        serve(python, place / "model", scratch)
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=False)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"rehearsed as {pwd.getpwuid(os.getuid()).pw_name}, served as {USER}: 0")


if __name__ == "__main__":
    main()
