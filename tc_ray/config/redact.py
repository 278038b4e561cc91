"""Secrets struck out of what a run writes, prints and hands on: addresses, storage options, overrides, messages.

Invariant: the functions return `***` in place of each secret they know: the userinfo of a URI, credentials of a query string,
values that are named like a secret, and values that this process got as one (`remember`). Redacting twice changes nothing. Used by everything that writes a file of a run or a line for people. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote

STRUCK_OUT = "***"
"""In place of a secret, which the environment or the command line has to give again."""

PLAIN_OPTIONS = frozenset(
    """
    account_name allow_http allow_invalid_certificates bucket bucket_name checksum_algorithm conditional_put
    connect_timeout container_name copy_if_not_exists default_region disable_tagging endpoint endpoint_url
    http1_only http2_only imdsv1_fallback locking_provider max_retries metadata_endpoint pool_idle_timeout
    pool_max_idle_per_host proxy_excludes region request_payer retry_timeout s3_allow_unsafe_rename
    s3_express s3_force_path_style s3_locking_provider skip_signature storage_account_name timeout unsigned_payload
    use_emulator use_fabric_endpoint user_agent virtual_hosted_style_request
    """.split()  # noqa: SIM905 - a list of one name a line would be four times as long
)
"""Storage options that are no secret, in lower case and without the store's prefix; every other value is struck out."""
_STORES = ("aws_", "azure_", "google_", "gcs_")

# tokens of a tokenizer (eos_token, tokenizer.pad_token) and what is counted or measured of tokens (token_id, token_accuracy)
_TEXT_TOKEN = (
    r"(?!(?:[\w-]+\.)*(?:(?:eos|bos|pad|unk|sep|cls|mask|first|last|next|target|special|start|end|max|min|num|per)_token(?:_ids?)?|"
    r"token_(?:accuracy|count|ids?|loss|type_ids))(?![\w.-]))"
)
_SECRET_NAME = (
    rf"{_TEXT_TOKEN}[\w.-]*(?:passw(?:or)?d|passphrase|secret|credential|(?:access|account|api|private|master|sas|shared)[_-]?key|"
    r"apikey|token(?![a-z]))[\w.-]*"
)
_USERINFO = re.compile(r"(://)[^\s/?#\"'<>`]*@")
# a password may hold / ? # unencoded; what follows the digits distinguishes it from a port
_ODD_USERINFO = re.compile(r"(://)(?![^\s/?#@:]*:\d+(?:[/?#\s]|$))[^\s/?#@:]*:[^\s\"'<>`]*@")
_QUERY = re.compile(
    rf"([?&;](?:{_SECRET_NAME}|pwd|sig|signature|x-amz-signature|x-goog-signature|key|auth|awsaccesskeyid)=)"
    r"[^&#\s\"'<>`;]*",
    re.IGNORECASE,
)
_QUOTED = r"\"[^\"]*\"|'[^']*'|`[^`]*`"
# name=value, and name: "value" (without quotes a colon is punctuation)
_NAMED = re.compile(
    rf"(?<![\w.-])({_SECRET_NAME}[\"'`]?(?:\s*=\s*(?:{_QUOTED}|[^\s,;&)}}\]\"'`]+)|\s*:\s*(?:{_QUOTED})))",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(\b(?:bearer|authorization[\"']?\s*[:=]\s*[\"']?basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)

_SHORTEST = 8
"""Shorter values are not looked for in texts: they would strike out ordinary words."""
_known: set[str] = set()


def remember(values: Iterable[str]) -> None:
    """Strike these values out of every text of this process from now on; those of less than 8 characters are ignored."""
    for value in values:
        if value != STRUCK_OUT:
            _known.update(form for form in (value, quote(value, safe=""), unquote(value)) if len(form) >= _SHORTEST)


def redact(text: str) -> str:
    """A text for people (an error, an event, a line of a log) without the secrets in it."""
    text = redact_address(redact_known(text))
    text = _AUTHORIZATION.sub(rf"\1{STRUCK_OUT}", text)
    return _NAMED.sub(lambda match: re.split(r"(?<=[=:])", match[0], maxsplit=1)[0] + STRUCK_OUT, text)


def redact_known(text: str) -> str:
    """A text without the values that were remembered, wherever they stand in it."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, STRUCK_OUT)
    return text


def redact_address(text: str) -> str:
    """A URI, or a text with URIs, without userinfo and query credentials; the result is the same on any machine."""
    text = _ODD_USERINFO.sub(rf"\1{STRUCK_OUT}@", text)
    text = _USERINFO.sub(rf"\1{STRUCK_OUT}@", text)
    return _QUERY.sub(rf"\1{STRUCK_OUT}", text)


def redact_options(options: Mapping[str, str]) -> dict[str, str]:
    """Storage options, where only the values on the list of harmless ones are kept."""
    return {name: _redact_option(name, value) for name, value in options.items()}


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name holds a secret; one that names a file does not."""
    return bool(re.fullmatch(_SECRET_NAME, variable, re.IGNORECASE)) and not re.search(
        r"_(file|path|dir|folder)$", variable, re.IGNORECASE
    )


def redact_override(text: str) -> str:
    """A word of a command line, such as `log.storage_options.aws_secret_access_key=...`, without the secret in it."""
    name, equals, value = text.partition("=")
    if not equals:
        return redact(text)
    leaf = name.strip().rpartition(".")[2]
    if "storage_option" in name.lower() and not name.startswith("-"):
        shown = _redact_option(leaf, value) if leaf != name and "storage_option" not in leaf else STRUCK_OUT
    elif re.fullmatch(_SECRET_NAME, leaf, re.IGNORECASE) or "storage_option" in value:
        shown = STRUCK_OUT
    else:
        shown = redact(value)
    return f"{name}={shown}"


def secrets_of(options: Mapping[str, str], *addresses: str | None) -> set[str]:
    """The secrets in storage options and addresses: option values, userinfo, passwords, query credentials."""
    found = {value for name, value in options.items() if _redact_option(name, value) == STRUCK_OUT}
    for address in (*addresses, *options.values()):
        found |= _parts(address or "")
    return found


def named_like_secrets(values: Mapping[str, str]) -> set[str]:
    """The values whose names say that they are secrets, and the secrets in addresses among the others."""
    found = {value for name, value in values.items() if re.fullmatch(_SECRET_NAME, name, re.IGNORECASE)}
    return found.union(*(_parts(value) for value in values.values()))


def _redact_option(name: str, value: str) -> str:
    plain = name.strip().lower()
    for store in _STORES:
        plain = plain.removeprefix(store)
    return redact_address(value) if plain in PLAIN_OPTIONS else STRUCK_OUT


def _parts(address: str) -> set[str]:
    """Userinfo of a URI, its password, and the values of credentials in its query."""
    found: set[str] = set()
    for pattern in (_ODD_USERINFO, _USERINFO):
        for match in pattern.finditer(address):
            info = match[0].removeprefix("://").removesuffix("@")
            found |= {info, info.partition(":")[2]}
    found |= {match[0].rpartition("=")[2] for match in _QUERY.finditer(address)}
    return found - {"", STRUCK_OUT}
