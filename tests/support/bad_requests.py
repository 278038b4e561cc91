"""Handmade bad requests to the server: bodies, headers and addresses that no client in its right mind sends.

Each must be refused, and quickly: `refused` holds the statuses that a refusal may have. `alive` is what the server must
still answer afterwards. Bodies are bytes, so that they can be no JSON, no UTF-8, or what no JSON library writes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

JSON_TYPE = {"Content-Type": "application/json"}
COMPLETIONS, CHAT, SCORE = "/v1/completions", "/v1/chat/completions", "/v1/score"
MINIMAL = {
    COMPLETIONS: '"model": "demo", "prompt": "Tom has 3"',
    CHAT: '"model": "demo", "messages": [{"role": "user", "content": "Tom has 3"}]',
    SCORE: '"model": "demo", "prompt": "Tom has 3", "completion": " apples"',
}
ALIVE = b'{"model": "demo", "prompt": "Tom has 3", "max_tokens": 2, "temperature": 0, "seed": 1}'


@dataclass(frozen=True)
class BadRequest:
    """One request that must be refused. chunked: the body is sent without a length, in pieces."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: JSON_TYPE)
    refused: frozenset[int] = frozenset({400})
    method: str = "POST"
    chunked: bool = False


HUGE = "9" * 400
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", HUGE, "-" + HUGE, "true", '"1"', "[]", "[1]", "{}"]
COUNTS = [*NUMBERS, "-1", "1.5", "1000000000000", "9223372036854775808"]
FLAGS = ["0", "1", '"true"', "[]", "{}", "NaN"]
TEXTS = ["1", "true", "{}", r'"\ud800"', r'"\udfff x"', "NaN"]

NUMBER_FIELDS = {
    "temperature": ["-0.1", "2.1"],
    "top_p": ["-0.1", "-1", "1.0001"],
}
GENERATION_COUNTS = {
    "n": ["0", "9", "1000000"],
    "max_tokens": ["-5", "65", "1000000"],
    "top_k": ["-2"],
    "min_tokens": [],
    "seed": [],
}
ROUTE_COUNTS: dict[str, dict[str, list[str]]] = {
    COMPLETIONS: {**GENERATION_COUNTS, "logprobs": ["6", "1000000"]},
    CHAT: {**GENERATION_COUNTS, "max_completion_tokens": ["0", "65", "1000000"], "top_logprobs": ["0", "1", "21"]},
    SCORE: {"top_logprobs": ["21", "1000000"]},
}
ROUTE_FLAGS = {COMPLETIONS: ["stream", "echo"], CHAT: ["stream", "logprobs"], SCORE: []}
ROUTE_TEXTS = {COMPLETIONS: ["model"], CHAT: ["model"], SCORE: ["model", "prompt", "completion"]}
ALLOWED = {("seed", "-1"), ("seed", "1000000000000"), ("top_k", "-1")}

UNSUPPORTED = [
    "logit_bias",
    "suffix",
    "user",
    "tools",
    "functions",
    "response_format",
    "modalities",
    "store",
    "N",
    "constructor",
]
UNSUPPORTED += [
    "__proto__",
    "",
    " model",
    "model_config",
    "lam",
    "lambda",
    "prompt_logprobs",
    "presence_penalty",
    "\\u0000",
    "\\ud800",
    "x" * 100_000,
    "min_p",
    "best of",
]


def bad_values() -> Iterator[BadRequest]:
    """Each field with each value of a wrong type or beyond its range."""
    for path, minimal in MINIMAL.items():
        values = {name: [*COUNTS, *more] for name, more in ROUTE_COUNTS[path].items()}
        numbers = NUMBER_FIELDS if path != SCORE else {}
        values |= {name: [*NUMBERS, *more] for name, more in numbers.items()}
        values |= {name: FLAGS for name in ROUTE_FLAGS[path]}
        values |= {name: TEXTS for name in ROUTE_TEXTS[path]}
        values |= {name: ["1", '"x"', "[]", '{"x": 1}', "true"] for name in ("copilot",)}
        if path != SCORE:
            values["logit_bias"] = ["1", "[]", '{"a": 1}', '{"5": 101}', '{"5": "1"}', '{"100000000": 1}', '{"-1": 1}']
            values["stop_token_ids"] = ["1", "[-1]", '["1"]', "[100000000]", json.dumps([1] * 65)]
            values["repetition_penalty"] = [*NUMBERS, "0", "-1", "11"]
            values["stream_options"] = ["1", "[]", '{"x": 1}', '{"include_usage": 1}', '{"include_usage": true}']
            many = json.dumps(["stop"] * 10_000)
            values["stop"] = [*TEXTS, '""', '[""]', "[1]", "[[]]", many, json.dumps(["a"] * 5), json.dumps("x" * 201)]
        for name, wrong in values.items():
            kept = ", ".join(part for part in _members(minimal) if not part.startswith(f'"{name}":'))
            for value in wrong:
                if (name, value) in ALLOWED:
                    continue
                body = f'{{{kept}{", " if kept else ""}"{name}": {value}}}'
                yield BadRequest(f"{path} {name}={value[:24]}", path, body.encode())
        for value in ['{"lambda": -1}', '{"lambda": NaN}', '{"lambda": "1"}', '{"lambda": 1e9}', '{"Lambda": 1}']:
            yield BadRequest(f"{path} copilot={value}", path, f'{{{minimal}, "copilot": {value}}}'.encode())
        for name in UNSUPPORTED:
            yield BadRequest(f"{path} unknown {name[:20]!r}", path, f'{{{minimal}, "{name}": 1}}'.encode())


def _members(minimal: str) -> list[str]:
    """The members of a JSON object written without braces."""
    return [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in json.loads(f"{{{minimal}}}").items()]


def bad_prompts() -> Iterator[BadRequest]:
    """Prompts, messages and completions that cannot be used."""
    prompts = {
        "no text": '""', "nothing": "[]", "null": "null", "object": '{"a": 1}', "flag": "true", "float ids": "[1.5]", "flags": "[true]",
        "id below": "[-1]", "id beyond": "[100000000]", "id huge": f"[{HUGE}]", "ids and text": '[1, "a"]', "text and ids": '["a", 1]',
        "empty in list": '[""]', "empty ids": "[[]]", "deep ids": "[[[1]]]", "mixed lists": '[[1], "a"]', "surrogate": r'"\ud83d"',
        "surrogate in list": r'["a", "\udc00"]', "too many": json.dumps(["a"] * 100_000), "too many ids": json.dumps([1] * 200_000),
        "too many id lists": json.dumps([[1]] * 100_000), "too long": json.dumps("a b" * 200_000), "id below in list": "[[1], [-1]]",
        "a million blanks": json.dumps(" " * 900_000), "one long word": json.dumps("x" * 900_000), "emoji": json.dumps("\U0001f600" * 60_000),
    }  # fmt: skip
    for name, prompt in prompts.items():
        for path, other in ((COMPLETIONS, ""), (SCORE, ', "completion": "a"')):
            if path == SCORE and name in (
                "too many",
                "too many id lists",
                "empty in list",
                "empty ids",
                "surrogate in list",
            ):
                other = ', "completion": ["a"]'
            yield BadRequest(f"{path} prompt: {name}", path, f'{{"model": "demo", "prompt": {prompt}{other}}}'.encode())
        score = f'{{"model": "demo", "prompt": "a", "completion": {prompt}}}'.encode()
        yield BadRequest(f"{SCORE} completion: {name}", SCORE, score)
        if name != "no text":  # a message may be empty
            message = f'{{"role": "user", "content": {prompt}}}'
            yield BadRequest(f"{CHAT} content: {name}", CHAT, f'{{"model": "demo", "messages": [{message}]}}'.encode())
    messages = ["[]", "null", "1", '"hi"', "{}", "[1]", "[[]]", "[null]", '[{"role": "user"}]', '[{"content": "a"}]']
    messages += [
        '[{"role": "tool", "content": "a"}]',
        '[{"role": 1, "content": "a"}]',
        '[{"role": "user", "content": 1}]',
    ]
    messages += [
        '[{"role": "user", "content": "a", "name": 1}]',
        '[{"role": "user", "content": null}]',
        '[{"role": "user", "content": [{"type": "image_url"}]}]',
    ]
    messages += [
        '[{"role": "user", "content": [{"type": "text", "text": 1}]}]',
        '[{"role": "user", "content": [{"type": "text"}]}]',
        r'[{"role": "user", "content": "a \udc00"}]',
        r'[{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]',
    ]
    messages += [
        json.dumps([{"role": "user", "content": "a"}] * 20_000),
        json.dumps([{}] * 100_000),
        json.dumps([1] * 300_000),
    ]
    for wrong in messages:
        yield BadRequest(f"{CHAT} messages={wrong[:40]}", CHAT, f'{{"model": "demo", "messages": {wrong}}}'.encode())


def bad_bodies() -> Iterator[BadRequest]:
    """Bodies that are no JSON object of the route at all."""
    deep = 100_000
    whole = {
        "empty": b"", "blank": b" \n", "null": b"null", "number": b"1", "text": b'"model"', "list": b"[]", "object": b"{}", "true": b"true",
        "NaN": b"NaN", "minus": b"-", "word": b"model=demo", "form": b"model=demo&prompt=a", "NUL": b"\0" * 1000, "half": b'{"model": "de',
        "half escape": b'{"model": "\\u12', "single quotes": b"{'model': 'demo'}", "comment": b'{/* */"model": "demo"}',
        "comma": b'{"model": "demo",}', "no comma": b'{"model": "demo" "prompt": "a"}', "raw line end": b'{"model": "de\nmo"}',
        "deep lists": b"[" * deep, "deep closed": b"[" * deep + b"]" * deep, "deep objects": b'{"a":' * deep,
        "deep closed objects": b'{"a":' * deep + b"1" + b"}" * deep, "deep mixed": b'[{"a":' * deep, "BOM": b"\xef\xbb\xbf[]",
        "UTF-16": '{"model": "demo"}'.encode("utf-16"), "UTF-32": '{"model": "demo"}'.encode("utf-32"), "gzip": gzip.compress(b"{}" * 9),
        "many members": b"{" + b",".join(b'"k%d": 1' % i for i in range(80_000)) + b"}", "long number": b"1" * 900_000,
        "long exponent": b'{"model": 1e' + b"9" * 900_000 + b"}", "long key": b'{"' + b"k" * 900_000 + b'": 1}', "zip": b"PK\x03\x04",
    }  # fmt: skip
    for name, body in whole.items():
        for path in MINIMAL:
            yield BadRequest(f"{path} body: {name}", path, body)
    for path, minimal in MINIMAL.items():
        good = f"{{{minimal}}}".encode()
        inner = {"prompt": "prompt", "stop": "stop", "copilot": "copilot", "x": "x"}
        for name in inner:
            for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
                nested = opening * deep + b"1" + closing * deep
                yield BadRequest(
                    f"{path} deep in {name} {opening!r}", path, good[:-1] + b', "%s": %s}' % (name.encode(), nested)
                )
        yield BadRequest(f"{path} twice", path, good + good)
        yield BadRequest(f"{path} trailing", path, good + b" x")
        yield BadRequest(f"{path} trailing NUL", path, good + b"\0")
        yield BadRequest(f"{path} broken UTF-8", path, good.replace(b"Tom", b"T\xff\xfem"))
        yield BadRequest(f"{path} cut UTF-8", path, good.replace(b"Tom", b"T\xe2\x82"))
        yield BadRequest(f"{path} overlong UTF-8", path, good.replace(b"Tom", b"\xc0\xaf"))
        yield BadRequest(f"{path} surrogate in UTF-8", path, good.replace(b"Tom", b"\xed\xa0\x80"))
        too_large = frozenset({413})
        yield BadRequest(f"{path} 2 MB of blanks", path, good + b" " * 2_000_000, refused=too_large)
        yield BadRequest(f"{path} 2 MB in chunks", path, good + b" " * 2_000_000, refused=too_large, chunked=True)


def bad_names() -> Iterator[BadRequest]:
    """Models that are not there, most of them files that are."""
    missing = frozenset({404})
    names = [
        "../../etc/passwd",
        "/etc/passwd",
        "demo/../demo",
        "./demo",
        "demo/",
        "..",
        ".",
        "demo\\..\\demo",
        "DEMO",
        "demo ",
        " demo",
    ]
    names += [
        "",
        "demo\0",
        "file:///etc/passwd",
        "%2e%2e%2f",
        "http://127.0.0.1/",
        "pilot",
        "export",
        "~",
        "*",
        "demo\n",
        "demo;id",
    ]
    names += ["$(id)", "{{7*7}}", "démo", "d\u0435mo", "x" * 500_000, "null", "None", "../" * 10_000]
    for name in names:
        for path, minimal in MINIMAL.items():
            body = {**json.loads(f"{{{minimal}}}"), "model": name}
            yield BadRequest(f"{path} model {name[:24]!r}", path, json.dumps(body).encode(), refused=missing)
    for part in [
        "..",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/%2e%2e/etc/passwd",
        "/etc/passwd",
        "demo/../demo",
        "demo%00",
        "%ff",
        "x" * 8000,
    ]:
        yield BadRequest(f"GET model {part[:24]}", f"/v1/models/{part}", b"", {}, missing, "GET")


def bad_heads() -> Iterator[BadRequest]:
    """Wrong content types, methods, addresses and headers around a good body."""
    for path, minimal in MINIMAL.items():
        good = f"{{{minimal}}}".encode()
        types = [
            "text/plain",
            "application/xml",
            "multipart/form-data",
            "application/x-www-form-urlencoded",
            "application/jsonx",
            "json",
            ";",
        ]
        for kind in [*types, "application/json2; charset=utf-8", "x" * 8000]:
            yield BadRequest(f"{path} type {kind[:24]}", path, good, {"Content-Type": kind}, frozenset({400, 415}))
        yield BadRequest(f"{path} no type", path, good, {}, frozenset({400, 415}))
        zipped = gzip.compress(b" " * 50_000_000)
        yield BadRequest(
            f"{path} zipped", path, zipped, {**JSON_TYPE, "Content-Encoding": "gzip"}, frozenset({400, 415})
        )
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"):
            yield BadRequest(f"{method} {path}", path, good, refused=frozenset({405}), method=method)
        for address in (path + "/", path + "/x", path.upper(), "/" + path, path + "%00", path + "/../../etc/passwd"):
            yield BadRequest(f"address {address}", address, good, refused=frozenset({404, 405}))
    for address in (
        "/v2",
        "/v1",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/" + "a" * 20_000,
        "/static/../app.py",
        "/page/../../app.py",
        "/.env",
    ):
        yield BadRequest(f"GET {address[:30]}", address, b"", {}, frozenset({404}), "GET")


def bad_requests() -> list[BadRequest]:
    """All of them."""
    return [*bad_values(), *bad_prompts(), *bad_bodies(), *bad_names(), *bad_heads()]
