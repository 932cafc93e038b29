"""Passwords, tokens and keys in text: found before they are written anywhere, blotted out of all that is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"

# What follows a colon is a port, not a password, where it is a number up to the path's begin. One slash may be lost:
# an address that was taken for a path.
_IN_ADDRESS = re.compile(
    r"(:/{1,2})([^\s/@:'\"]*:(?!\d+(?:[/?#\s'\"]|$))[^\s@'\"]+)@|(https?:/{1,2})([^\s/@?#'\"]+)@", re.IGNORECASE
)
_IN_QUERY = re.compile(
    r"(?<=[?&;])([\w.%-]*(?:token|secret|passw|pwd|signature|credential|api_?-?key|access_?-?key(?:id)?|auth(?!or))[\w.%-]*"
    r"|sig|key)=([^\s&;#'\"]+)",
    re.IGNORECASE,
)
_SHAPES = {
    "a Hugging Face token": r"\bhf_(?=[a-zA-Z0-9]*[A-Z0-9])[A-Za-z0-9]{12,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b",
    "a GitHub token": r"\b(?:gh[oprsu]_|github_pat_)\w{16,}",
    "a GitLab token": r"\bglpat-[\w-]{16,}",
    "an API key": r"\bsk-[\w-]{16,}|\bAIza[\w-]{30,}|\bdapi[0-9a-f]{32}",
    "a Slack token": r"\bxox[a-z]-[\w-]{10,}",
    "a signed token": r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
}
_SHAPED = [(kind, re.compile(pattern)) for kind, pattern in _SHAPES.items()]
_ANY_SHAPE = re.compile("|".join(_SHAPES.values()))
_NAMES = (
    "access_key", "access_token", "api_key", "api_token", "apikey", "auth_token", "bearer_token", "hf_token", "passwd",
    "password", "private_key", "secret", "secret_access_key", "secret_key", "session_token", "token",
)  # fmt: skip
_NAMED = re.compile(rf"(?:.*[_.-])?(?:password|passwd|secret|api_key|access_key)|{'|'.join(_NAMES)}", re.IGNORECASE)
_ENVIRONMENT = re.compile(
    r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|ACCESS_KEY_ID|CREDENTIAL)|.*_(?:PWD|PAT)", re.IGNORECASE
)
_SHORTEST, _SHORTEST_WORD = 8, 16  # a shorter value of the environment is found in innocent words too


def redacted(text: str) -> str:
    """Return text with every secret in it blotted out: by its place in an address, its shape, or the environment's."""
    text = _IN_ADDRESS.sub(lambda found: f"{found[1] or found[3]}{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1={HIDDEN}", text)
    text = _ANY_SHAPE.sub(HIDDEN, text)
    for value in environment_secrets():
        text = text.replace(value, HIDDEN)
    return text


def secret_in(text: str, name: str = "", of_environment: Sequence[str] | None = None) -> str | None:
    """Return what secret a text holds, in words for a sentence; None where it holds none.

    Args:
        text: A value of an experiment file, or an address.
        name: The key it stands under.
        of_environment: `environment_secrets()`, for who asks for many texts.
    """
    if found := _IN_ADDRESS.search(text):
        return "a password in an address" if found[2] else "a user or token in an address"
    if found := _IN_QUERY.search(text):
        return f"the secret `{found.group(1)}` in an address"
    for kind, pattern in _SHAPED:
        if pattern.search(text):
            return kind
    if text and text != HIDDEN and is_secret_name(name):
        return f"a secret under `{name}`"
    known = environment_secrets() if of_environment is None else of_environment
    if any(value in text for value in known):
        return "a secret of this environment"
    return None


def without_secrets(value: Any) -> Any:
    """Return a plain value, as YAML gives it, with what stands under a secret's name blotted out; for what is
    quoted.
    """
    if isinstance(value, dict):
        return {k: HIDDEN if v and is_secret_name(str(k)) else without_secrets(v) for k, v in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


def is_secret_name(name: str) -> bool:
    """Return whether a key's name says that its value is a secret."""
    return _NAMED.fullmatch(name) is not None


def is_secret_variable(name: str) -> bool:
    """Return whether a variable's name says that its value is a secret."""
    return _ENVIRONMENT.fullmatch(name) is not None


def environment_secrets() -> tuple[str, ...]:
    """Return the values of the environment's secrets, the longest first."""
    return _secrets_among(tuple(os.environ.items()))


@lru_cache(maxsize=4)
def _secrets_among(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    found = set()
    for name, value in environment:
        if is_secret_variable(name) and not value.startswith("/"):
            found.add(value)
        for inside in _IN_ADDRESS.finditer(value):
            password = (inside[2] or inside[4]).partition(":")[2] or inside[4] or ""
            found |= {password, unquote(password)}
    telling = {value for value in found if len(value) >= (_SHORTEST_WORD if value.isalpha() else _SHORTEST)}
    return tuple(sorted(telling, key=len, reverse=True))
