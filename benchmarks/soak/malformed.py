"""Bad requests made by hand: bodies, heads, and messages that two readers could read differently.

The tests of the API and of the listener look at the answers one by one; the soak sends them all.
"""

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
NEXT = GET + b"\r\n"  # a second message that a first one smuggles in

BODIES: list[tuple[bytes, str]] = [  # and what is said of it
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"prompt": "a', "string at character 11"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b'{"prompt": NaN}', "NaN is not"),
    (b'{"prompt": -Infinity}', "Infinity is not"),
    (b'{"temperature": 1e400}', "too large"),
    (b'{"max_tokens": ' + b"9" * 5000 + b"}", "too many digits"),
    (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "deeper than 64"),
    (b'{"prompt": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
    (b'{"prompt": "a", "prompt": "b"}', "stands twice"),
    (b'{"prompt": "a", "stream_options": {"x": 1, "x": 2}}', "stands twice"),
    ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    ('{"prompt": "a"}'.encode("utf-16-le"), "not JSON"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "not JSON"),
    (b'{"prompt": "\xff"}', "not UTF-8"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "a", "stop": ["\\udfff\\ud800"]}', "surrogate"),
    (b'{"prompt": "a"} x', "not JSON"),
]

HEADS: list[tuple[bytes, int, str]] = [  # its status and code
    (GET + b"x: " + b"a" * (1 << 20) + b"\r\n\r\n", 431, "headers_too_large"),
    (GET + b"x: y\r\n" * 10_000 + b"\r\n", 431, "headers_too_large"),
    (GET + b"x: y\r\n" * 101 + b"\r\n", 431, "headers_too_large"),
    (GET + b"a" * (1 << 20), 431, "headers_too_large"),
    (b"GET /" + b"a" * (256 << 10) + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "url_too_long"),
    (b"GET /?" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414, "url_too_long"),
]

SMUGGLED: list[bytes] = [  # one 400, and the connection ends
    POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"content-length: 2\r\ncontent-length: 30\r\n\r\n{}" + NEXT,
    POST + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}" + NEXT,
    POST + b"content-length: 2, 2\r\n\r\n{}" + NEXT,
    POST + b"content-length: -1\r\n\r\n" + NEXT,
    POST + b"content-length: +2\r\n\r\n{}" + NEXT,
    POST + b"content-length: 0x2\r\n\r\n{}" + NEXT,
    POST + b"content-length: 99999999999999999999\r\n\r\n{}" + NEXT,
    POST + b"content-length : 2\r\n\r\n{}" + NEXT,
    POST + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + NEXT,
    POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n" + NEXT,
    POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}x0\r\n\r\n" + NEXT,
    POST + b"transfer-encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n" + NEXT,
    GET + b"x: a\rb\r\n\r\n" + NEXT,
    GET + b"x: a\x00b\r\n\r\n" + NEXT,
    GET + b"x y: z\r\n\r\n" + NEXT,
    GET + b" folded: z\r\n\r\n" + NEXT,
    GET + b"host: y\r\n\r\n" + NEXT,
    b"GET /health/live HTTP/1.1\r\n\r\n" + NEXT,
    b"GET /health/live HTTP/9.9\r\nhost: x\r\n\r\n" + NEXT,
    b"\x16\x03\x01\x02\x00\x01\x00" + NEXT,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + NEXT,
    b"{}" + NEXT,
]


def post(body: bytes) -> bytes:
    """The message that brings this body."""
    return POST + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def messages() -> list[bytes]:
    """All of them."""
    bodies = [post(body) for body, _ in BODIES]
    return bodies + [head for head, _, _ in HEADS] + SMUGGLED
