"""`python -m server serve`: the port first, then the engine, then whoever asks."""

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvloop

from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from server.api.app import build
from server.api.front import Front
from server.api.keys import Keys
from server.api.served import Served
from server.blueprint import engine_options
from server.config import Settings
from server.engine.process import Blueprint, Client
from server.errors import KvistError, ModelError, PortTaken, SettingError
from server.listen import Server, bind, configure
from server.logs import set_up
from server.metrics import Metrics
from server.settle import settle
from server.traces import Traces
from server.version import VERSION

log = logging.getLogger("kvist")
BEAT = 0.1  # seconds between two looks at how late the event loop is


def run(settings: Settings) -> int:
    """Serve until a signal; the exit status."""
    set_up(settings)
    _raise_file_limit()
    try:
        keys = Keys(settings.api_keys)
        options = engine_options(settings)
        _check_tls(settings)
        listener = _listen(settings)
        return asyncio.Runner(loop_factory=uvloop.new_event_loop).run(
            _serve(settings, keys, options, listener)
        )
    except KvistError as error:
        print(f"kvist: {error.message}", file=sys.stderr)
        return 1


def _raise_file_limit() -> None:
    """Each connection is a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 65536)), hard))


def _check_tls(settings: Settings) -> None:
    """Read the certificate once, before anything that is slow."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")  # nobody to ask
    except OSError as error:  # of ssl too
        files = f"{settings.tls_cert} and {settings.tls_key}"
        why = error.strerror or error
        raise SettingError(
            f"{files} are no certificate and its key in PEM, without a password: {why}."
        ) from None


def _listen(settings: Settings) -> socket.socket:
    """Take the port before anything that is slow."""
    try:
        return bind(settings.host, settings.port)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        taken = error.errno == errno.EADDRINUSE
        why = "it is taken; choose another --port" if taken else error.strerror
        raise PortTaken(f"{where} cannot be listened on: {why}.") from None


async def _serve(
    settings: Settings, keys: Keys, options: dict[str, Any], listener: socket.socket
) -> int:
    client = Client(Blueprint(options=options), unread=settings.limits.unread_events)
    front = Front(settings, client, Metrics(_name(settings), VERSION), keys)
    front.metrics.watch(client)
    server = configure(build(front), front)
    url = f"{'https' if settings.tls_cert else 'http'}://{_address(listener)}"
    tasks = [
        asyncio.create_task(server.serve([listener])),
        asyncio.create_task(_open(front, client, url)),
        asyncio.create_task(_feel(front)),
    ]
    if settings.otlp_endpoint:
        front.traces = Traces(settings.otlp_endpoint)
        tasks.append(asyncio.create_task(front.traces.run()))
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _rotate, keys)
    try:
        return await _until_over(server, client, tasks[0], tasks[1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.stop()
        front.pool.close()


async def _until_over(
    server: Server, client: Client, serving: "asyncio.Task[None]", opening: "asyncio.Task[None]"
) -> int:
    """0 after a signal; otherwise it is raised why this server cannot go on."""
    await asyncio.wait({serving, opening}, return_when=asyncio.FIRST_COMPLETED)
    if opening.done():
        lost = asyncio.create_task(client.gave_up())
        if opening.exception() is None:
            await asyncio.wait({serving, lost}, return_when=asyncio.FIRST_COMPLETED)
        failed = opening.exception() or (KvistError(lost.result()) if lost.done() else None)
        lost.cancel()
        if failed is not None and not serving.done():
            server.should_exit = server.force_exit = True
            await serving
            raise failed
    await serving
    return 0


async def _open(front: Front, client: Client, url: str) -> None:
    """From a started engine to a model that is served."""
    await client.start()
    settings, info = front.settings, client.info
    front.served = await asyncio.to_thread(_served, settings, info)
    settle()
    log.info("%s", _greeting(front.served, info, url))
    for warning in info.get("warnings", ()):
        log.warning("%s", warning)


def _served(settings: Settings, info: dict[str, Any]) -> Served:
    folder = settings.tokenizer or Path(info["folder"])
    limits = settings.limits
    caps: dict[str, Any] = {"seconds": limits.template_seconds, "size": limits.template_bytes}
    try:
        words = Tokenizer.load(folder)
        if settings.chat_template is not None:
            source = settings.chat_template.read_text("utf-8")
            template: ChatTemplate | None = ChatTemplate(source, words.names, **caps)
        else:
            template = ChatTemplate.load(folder, words.names, **caps)
    except OSError as error:
        raise SettingError(f"{settings.chat_template} cannot be read: {error.strerror}.") from None
    except Exception as error:
        raise ModelError(f"{folder}: {error}") from None
    return Served(
        names=settings.served_name or (_name(settings),),
        words=words,
        template=template,
        context=info["context"],
        vocabulary=info["vocabulary"],
        capacity=info["capacity"],
        eos=tuple(info["eos"]),
        created=int(time.time()),
        fingerprint=_fingerprint(info),
        limits=limits,
        about={name: value for name, value in info.items() if name != "folder"},
    )


def _fingerprint(info: dict[str, Any]) -> str:
    """The numbers that answers are computed in: of activations, weights, and pages."""
    kinds = [info.get(name, "") for name in ("dtype", "weights", "kv_dtype")]
    return "-".join(["kvist", VERSION, *kinds])


def _name(settings: Settings) -> str:
    """What clients call the model, unless --served-name says otherwise."""
    if settings.served_name:
        return settings.served_name[0]
    name = settings.model or "kvist"
    return Path(name).resolve().name if os.path.isdir(name) else name


def _greeting(served: Served, info: dict[str, Any], url: str) -> str:
    """One line that answers what people ask first; /health has the rest."""
    computed, kept = info.get("dtype", "?"), info.get("weights", "?")
    weights = "" if kept == computed else f" with {kept} weights"
    return (
        f"Kvist {VERSION} serves {', '.join(served.names)} on {info.get('device', '?')}"
        f" in {computed}{weights} ({_ways(info.get('kernels', {}))});"
        f" the KV cache holds {served.capacity} tokens, a request up to {served.context}: {url}"
    )


def _ways(kernels: dict[str, str]) -> str:
    """Which kernels run which way, and why: those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for name, reason in kernels.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{why}: {', '.join(names)}" for why, names in reasons.items())


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _rotate(keys: Keys) -> None:
    """SIGHUP: take the keys as they are now."""
    try:
        keys.read()
        log.info("The API keys were read again.")
    except SettingError as error:
        log.error("The API keys stay as they were: %s", error.message)


async def _feel(front: Front) -> None:
    """How late the event loop is, as a metric."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + BEAT
        await asyncio.sleep(BEAT)
        front.metrics.lag.observe(max(0.0, loop.time() - due))
