"""The faults and threats of the reliability contract, and where each is shown to be answered.

T47 and T82 are of several machines and are shown with them.
"""

import ast
import base64
import gc
import importlib
import json
import os
import pickle
import re
import signal
import socket
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from model.batch import Batch, Output
from server.config import Settings
from server.engine.pages import link, root
from server.errors import from_code
from tests.server.rig import Rig, read_all, running
from tests.server.test_api_http import COMPLETION, call, check_error, events, until
from tests.server.test_scheduler import Bench, Recorder

TESTS = Path(__file__).parents[1]

SHOWN = {
    "T01": "server/test_api_fields::test_refused_with_a_sentence",
    "T02": "server/test_api_fields::test_refused_with_a_sentence",
    "T03": "server/test_api_fields::test_refused_with_a_sentence",
    "T04": "server/test_api_fields::test_refused_with_a_sentence",
    "T05": "server/test_api_fields::test_refused_with_a_sentence",
    "T06": "server/test_api_http::test_texts_that_are_odd_and_fine",
    "T07": "server/test_api_fields::test_what_is_not_served_is_said",
    "T08": "server/test_api_fields::test_what_is_not_served_is_said",
    "T09": "server/test_rows::test_thousands_of_schemas_leave_nothing",
    "T10": "server/test_text::test_a_stop_made_to_be_slow_costs_linear_time"
    " server/test_rows::test_every_regular_expression_is_known"
    " server/test_rows::test_crafted_text_costs_linear_time"
    " model/test_tokenizer::test_a_megabyte_of_any_letter",
    "T11": "server/test_api_chat::test_templates_of_a_request_and_their_variables_are_kept_out"
    " model/test_chat::test_a_template_that_would_never_end_is_ended",
    "T12": "server/test_api_fields::test_prompts"
    " model/test_chat::test_special_tokens_in_messages_are_text",
    "T13": "server/test_api_http::test_bodies_that_are_refused",
    "T14": "server/test_api_http::test_only_plain_json_is_taken",
    "T15": "server/test_api_http::test_a_body_too_large_is_refused_early"
    " server/test_rows::test_a_client_that_leaves_in_its_body_leaves_nothing",
    "T16": "server/test_api_http::test_health_answers_while_a_monster_is_parsed"
    " server/test_serve::test_health_answers_while_a_long_text_is_read",
    "T20": "server/test_listen::test_heads_have_a_size",
    "T21": "server/test_listen::test_chunk_bombs"
    " server/test_rows::test_chunks_have_no_endless_frames",
    "T22": "server/test_api_http::test_only_plain_json_is_taken"
    " server/test_api_http::test_charset_and_range_are_harmless",
    "T23": "server/test_listen::test_what_two_readers_could_read_differently_gets_one_400",
    "T24": "server/test_listen::test_slow_and_idle_connections_end",
    "T25": "server/test_listen::test_a_client_that_reads_nothing_is_given_up"
    " server/test_process::test_who_does_not_read_is_cut_off_and_nobody_else",
    "T30": "server/test_api_http::test_a_client_that_leaves_is_cancelled"
    " server/test_api_http::test_all_prompts_of_a_call_are_cancelled_together",
    "T31": "server/test_process::test_leaving_early_ends_it_in_the_engine",  # at speed: soak, G3
    "T32": "server/test_scheduler::test_a_cancellation_ends_it_in_any_state"
    " server/test_simulation::test_nothing_is_violated",
    "T33": "server/test_scheduler::test_a_long_prompt_never_holds_up_a_stream"
    " server/test_scheduler::test_a_long_prompt_leaves_room_for_short_ones"
    " server/test_scheduler::test_the_newest_gives_way_and_after_three_times_nobody_can_move_it",
    "T34": "server/test_engine::test_any_mix_gives_what_each_gets_alone"
    " benchmarks/test_isolation::test_hostile_neighbours_change_nothing"
    " server/test_simulation::test_nothing_is_violated",
    "T35": "server/test_api_fields::test_room_is_what_the_context_leaves"
    " server/test_scheduler::test_what_can_never_be_served_is_refused_with_the_reason",
    "T36": "server/test_scheduler::test_a_full_queue_says_so_and_empties"
    " server/test_rows::test_a_full_queue_and_a_deadline_have_their_status",
    "T37": "server/test_scheduler::test_time_is_up_wherever_it_is"
    " server/test_rows::test_a_full_queue_and_a_deadline_have_their_status",
    "T38": "server/test_api_http::test_request_ids",
    "T40": "server/test_api_chat::test_messages_that_are_refused",
    "T41": "server/test_contract::test_nothing_shipped_runs_what_strangers_send",
    "T42": "server/test_serve::test_only_the_port_listens",
    "T43": "server/test_rows::test_a_pickle_is_a_text"
    " server/test_contract::test_nothing_shipped_runs_what_strangers_send",
    "T44": "server/test_start::test_what_is_wrong_with_a_model_is_one_sentence"
    " model/test_weights::test_a_broken_folder_is_refused"
    " model/test_tokenfiles::test_a_broken_file_is_one_sentence"
    " server/test_serve::test_a_model_that_is_none_is_named",
    "T45": "server/test_rows::test_names_are_no_paths",
    "T46": "server/test_api_http::test_a_bug_is_a_500_that_says_nothing"
    " server/test_api_fuzz::test_a_thousand_mutations",
    "T48": "server/test_deploy::test_every_wheel_is_pinned_with_its_hash",
    "T50": "server/test_api_http::test_no_trick_opens_a_door",
    "T51": "server/test_api_http::test_every_route_but_the_probes_needs_a_key",
    "T52": "server/test_contract::test_keys_stay_secret server/test_serve::test_the_key_is_nowhere",
    "T53": "server/test_api_http::test_keys_do_not_share_pages",
    "T54": "server/test_pages::test_parents_salts_and_borders_tell_prefixes_apart"
    " server/test_rows::test_crafted_blocks_never_meet server/test_rows::test_no_salt_is_a_page",
    "T55": "server/test_api_http::test_hosts",
    "T56": "server/test_api_http::test_docs_are_off_beyond_loopback",
    "T57": "server/test_serve::test_every_line_of_the_log_is_an_object"
    " server/test_contract::test_a_log_line_is_one_line",
    "T60": "server/test_process::test_a_killed_engine_is_told_of_and_replaced"
    " server/test_serve::test_the_engine_comes_back",
    "T61": "server/test_process::test_a_hung_engine_is_not_ready_and_goes_on_when_it_comes_back"
    " server/test_process::test_one_that_hangs_too_long_is_replaced",
    "T62": "server/test_process::test_the_engine_does_not_outlive_the_front"
    " server/test_faults::test_nothing_outlives_a_killed_front",
    "T63": "server/test_process::test_an_engine_that_dies_at_every_start_is_given_up"
    " server/test_faults::test_a_server_whose_engine_never_lives_gives_up",
    "T64": "server/test_api_http::test_a_drain_lets_running_answers_finish"
    " benchmarks/test_soak::test_a_small_soak",
    "T65": "server/test_api_http::test_a_drain_has_an_end",
    "T66": "server/test_serve::test_a_signal_during_loading_ends_it_at_once"
    " server/test_rows::test_a_second_signal_ends_a_drain",
    "T67": "server/test_scheduler::test_a_failed_step_is_tried_again"
    " server/test_scheduler::test_who_makes_steps_fail_fails_alone",
    "T68": "server/test_rows::test_a_step_without_memory_fails_who_needs_it",
    "T69": "server/test_start::test_what_is_wrong_with_a_setting_is_one_sentence",
    "T70": "server/test_scheduler"
    "::test_numbers_that_are_none_fail_their_request_and_are_not_found_again",
    "T71": "model/test_weights::test_a_broken_folder_is_refused",
    "T72": "server/test_contract::test_infinite_logprobs_are_still_json",
    "T73": "server/test_text::test_any_split_gives_what_the_oracle_gives",
    "T74": "server/test_text::test_a_stop_across_tokens_never_leaks_its_beginning"
    " server/test_text::test_the_stop_may_be_the_whole_output",
    "T75": "model/test_tokenizer::test_sixty_four_threads_share_a_tokenizer",
    "T76": "server/test_simulation::test_nothing_is_violated"  # a wall clock that is read fails
    " server/test_rows::test_only_what_is_told_reads_the_wall_clock",
    "T77": "server/test_faults::test_logs_that_cannot_be_written_do_not_stop_it",
    "T78": "server/test_serve::test_a_taken_port_is_said_before_anything_is_loaded",
    "T79": "server/test_faults::test_more_clients_than_files",
    "T80": "server/test_rows::test_requests_leave_no_garbage",  # and over time: soak, G10
    "T81": "server/test_api_http::test_metrics_have_vllms_names_and_a_fixed_number_of_series",
    "T83": "server/test_serve::test_equal_streams_at_once",  # a thousand: soak, G2
    "T84": "server/test_api_fuzz::test_ten_thousand_mutations",
}


@pytest.mark.parametrize("row", SHOWN)
def test_each_row_has_tests_that_exist(row: str) -> None:
    for name in SHOWN[row].split():
        file, _, test = name.partition("::")
        tree = ast.parse((TESTS / f"{file}.py").read_text())
        known = (ast.FunctionDef, ast.AsyncFunctionDef)
        assert test in {node.name for node in tree.body if isinstance(node, known)}, name


@pytest.fixture
def rig() -> Any:
    with running() as made:
        yield made


def test_thousands_of_schemas_leave_nothing(rig: Rig) -> None:
    """T09: each is refused by its field's name, and nothing is kept of it."""
    before = len(gc.get_objects())
    for i in range(500):
        schema = {"type": "object", "properties": {f"p{i}": {"type": "string"}}}
        format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status, _, body = call(rig, "/v1/completions", COMPLETION | {"response_format": format})
        assert (status, body["error"]["param"]) == (400, "response_format")
    gc.collect()
    assert len(gc.get_objects()) - before < 5000
    assert not rig.engine.seen


def test_a_full_queue_and_a_deadline_have_their_status(rig: Rig) -> None:
    """T36, T37: before the first byte a status, and when to come back; after it an event."""
    for code, expected in (("queue_full", 429), ("queue_timeout", 503), ("deadline_exceeded", 504)):
        rig.engine.fail_at, rig.engine.code = 0, code
        status, headers, body = call(rig, "/v1/completions", COMPLETION)
        check_error(body, code)
        assert status == expected
        assert ("retry-after" in headers) == (status in (429, 503))
        rig.engine.fail_at = 2
        status, _, data = call(rig, "/v1/completions", COMPLETION | {"stream": True})
        assert status == 200
        check_error(events(data)[-1], code)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "tiny/../tiny", "file:///etc"]
)
def test_names_are_no_paths(rig: Rig, name: str) -> None:
    """T45: a model's name is compared, and never opened."""
    status, _, body = call(rig, "/v1/completions", COMPLETION | {"model": name})
    assert status == 404
    check_error(body)
    for path in ("/v1/models/", "/playground/", "/"):
        for said in (name, quote(name, safe="")):
            status, _, body = call(rig, path + quote(said, safe="/%.:"))
            assert status == 404, path + said
            assert b"root:" not in json.dumps(str(body)).encode()


def test_requests_leave_no_garbage(rig: Rig) -> None:
    """T80: no cycle holds a prompt until the collector comes by, however a request ended."""
    bodies: list[dict[str, Any]] = [{}, {"stream": True}, {"n": 3}, {"max_tokens": 9**9}, {"x": 1}]
    for body in bodies:
        call(rig, "/v1/completions", COMPLETION | body)  # what is kept from the first time
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for body in bodies * 4:
            call(rig, "/v1/completions", COMPLETION | body)
            _leave(rig, body)
        until(lambda: not rig.front.running)
        gc.collect()
        ours = [one for one in gc.garbage if type(one).__module__.startswith("server.")]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not ours, {type(one).__qualname__ for one in ours}


# Regular expressions that read what strangers wrote, each with texts made to be slow
PATTERNS: dict[str, list[str]] = {
    "server/api/body.py": ["\\u", "\\ud", "\\", "d8"],
    "server/api/door.py": [":", ":1", "1", "a.", "-"],
    "server/traces.py": ["00-", "0", "0-"],
    "model/chat.py": ["\ue000", "\ue000a", "\ue001", "a"],
    "model/spelling.py": ["<0x", "<0x0", "<"],
}
NOT_THEIRS = {  # and those that read settings, a model's files, or this machine
    "server/config.py", "server/engine/build.py", "model/bytepairs.py", "model/family.py",
    "model/checkpoint.py", "model/manifest.py", "model/device.py",
}  # fmt: skip


def _calls(path: Path) -> list[ast.Call]:
    """Uses of the module re, and their literal patterns."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [node for node in nodes if ast.unparse(node.func).startswith("re.")]


def test_every_regular_expression_is_known() -> None:
    """T10: whose text it reads is written down before it is used."""
    root = TESTS.parent
    files = [*root.glob("server/**/*.py"), *root.glob("model/*.py"), *root.glob("kernels/*.py")]
    found = {str(path.relative_to(root)) for path in files if _calls(path)}
    assert found == set(PATTERNS) | NOT_THEIRS


@pytest.mark.parametrize("file", PATTERNS)
def test_crafted_text_costs_linear_time(file: str) -> None:
    """T10: a megabyte of each; a search that looks twice at every pair of places takes hours."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    compiled = [one for one in vars(module).values() if isinstance(one, re.Pattern)]
    arguments = [call.args[0] for call in _calls(TESTS.parent / file)]
    literals = [ast.literal_eval(one) for one in arguments if isinstance(one, ast.Constant)]
    for pattern in [*compiled, *(re.compile(one) for one in literals)]:
        for part in PATTERNS[file]:
            text = part * (10**6 // len(part)) + "!"
            subject: Any = text.encode() if isinstance(pattern.pattern, bytes) else text
            for _ in pattern.finditer(subject):
                pass
            pattern.fullmatch(subject)


@pytest.mark.parametrize("count", [50_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_crafted_blocks_never_meet(count: int) -> None:
    """T54: tokens that Python hashes alike, other parents, other salts, other borders."""
    modulus = sys.hash_info.modulus  # hash(i) == i % modulus, and of tuples it is mixed from those
    assert hash(1) == hash(1 + modulus)
    roots = [root(salt) for salt in ("", "a", "\0", "a\0")]
    seen = {
        link(parent, (i % 7, i // 7, -1 - (i & 1)))  # and hash(-1) == hash(-2)
        for i in range(count // 4)
        for parent in roots
    }
    assert hash((0, 0, -1)) == hash((0, 0, -2))
    assert len(seen) == 4 * (count // 4)
    assert root("") != link(root(""), ()) != link(link(root(""), ()), ())


def test_no_salt_is_a_page() -> None:
    """T54: a salt is a client's to choose, even so that it spells a digest and some tokens."""
    parent = b"p" * 32  # a digest that happens to be text
    spelled = parent + array("i", [65, 66]).tobytes()
    assert root(spelled.decode()) != link(parent, [65, 66])
    assert root(parent.decode()) != link(parent, [])


@pytest.mark.parametrize(
    "says",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
    ],
)
def test_a_step_without_memory_fails_who_needs_it(says: str) -> None:
    """T68: with 503; the engine lives, the others get what they would, nothing is left behind."""

    class Small(Recorder):
        def launch(self, batch: Batch) -> Callable[[], Output]:
            if 60 in batch.tokens.tolist():
                raise RuntimeError(says)
            return super().launch(batch)

    bench = Bench()
    bench.engine._executor = Small(256, 4)
    good = [bench.submit(1, 2, i, max_tokens=6) for i in range(4)]
    bench.step()
    bad = bench.submit(60, 3, 4)
    event = bench.finish()[bad.id]
    assert (event.code, event.done) == ("out_of_memory", True)
    assert from_code(event.code, "").status == 503
    assert all(bench.right(request) for request in good)
    assert bench.pages.live == 0


def test_only_what_is_told_reads_the_wall_clock() -> None:
    """T76: an answer's `created`, a span's times, a template's date; no timeout, no rate."""
    told = {"server/api/generate.py", "server/traces.py", "server/serve.py", "model/sandboxed.py"}
    found = set()
    for path in [*TESTS.parent.glob("server/**/*.py"), *TESTS.parent.glob("model/*.py")]:
        text = path.read_text()
        if re.search(r"\btime\.time(_ns)?\(|datetime\.now|\butcnow\(", text):
            found.add(str(path.relative_to(TESTS.parent)))
    assert found == told


@pytest.mark.parametrize(
    "bomb",
    [
        b"1;" + b"x" * (8 << 20) + b"\r\n{\r\n0\r\n\r\n",  # one endless chunk extension
        b"1;x\r\n \r\n" * 1000 + b"0\r\n" + b"x: y\r\n" * 100_000 + b"\r\n",  # trailers
        b"f" * 32 + b"\r\n",
        b"0" * (8 << 20),
    ],
)
def test_chunks_have_no_endless_frames(rig: Rig, bomb: bytes) -> None:
    """T21: what stands around a body's bytes is bounded as its head is."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    before = _resident()
    data = rig.raw(head + b"transfer-encoding: chunked\r\n\r\n" + bomb)
    assert not data or re.match(rb"HTTP/1.1 4\d\d ", data)
    assert _resident() - before < 64 << 20
    assert call(rig, "/health/live")[0] == 200


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_in_its_body_leaves_nothing(rig: Rig, reset: bool) -> None:
    """T15, T30: a body that ends too early, with a FIN or with a reset, is nobody's request."""
    seen = len(rig.engine.seen)
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with rig.connect() as one:
        one.sendall(f'{head}content-length: 100\r\n\r\n{{"prompt": "x"'.encode())
        until(lambda: len(rig.server.server_state.connections) == 1)
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(lambda: not rig.server.server_state.connections)
    until(lambda: not rig.front.running)
    assert len(rig.engine.seen) == seen


def test_a_pickle_is_a_text(rig: Rig, tmp_path: Path) -> None:
    """T43: what would run when unpickled is refused by its field's name, or is never looked at."""
    canary = tmp_path / "canary"
    raw = base64.b64encode(pickle.dumps(_Bomb(canary))).decode()
    for field in ("prompt_embeds", "logits_processors", "guided_json", "cache_salt", "user"):
        status, _, body = call(rig, "/v1/completions", COMPLETION | {field: raw})
        assert status == (200 if field in ("cache_salt", "user") else 400), body
    assert not canary.exists()
    pickle.loads(base64.b64decode(raw))
    assert canary.exists(), "the bomb is none"


class _Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_second_signal_ends_a_drain() -> None:
    """T66: the first waits for who is served, the second for nobody."""
    with running(Settings(shutdown_timeout=600)) as rig:
        rig.engine.delay = 0.02
        with rig.connect() as one:
            asked = json.dumps(COMPLETION | {"max_tokens": 4000, "stream": True}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(asked)}\r\n"
            one.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + asked)
            data = one.recv(100)
            rig.server.handle_exit(signal.SIGTERM, None)
            until(lambda: rig.front.closed)
            rig.server.handle_exit(signal.SIGTERM, None)
            data += read_all(one)
        assert b'"code":"draining"' in data


def _leave(rig: Rig, body: dict[str, Any]) -> None:
    """Ask, and hang up as soon as the engine has it, or at once when it never will."""
    seen = len(rig.engine.seen)
    rig.engine.delay = 0.01
    asked = json.dumps(COMPLETION | {"max_tokens": 500} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(asked)}\r\n"
    with rig.connect() as one:
        one.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + asked)
        refused = "x" in body or "max_tokens" in body
        until(lambda: refused or len(rig.engine.seen) > seen)
    until(lambda: not rig.engine.running)
    rig.engine.delay = 0.0
