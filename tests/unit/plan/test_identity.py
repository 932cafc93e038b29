"""Canonical JSON and content digests: one value one text, one content one digest, no trust in a damaged cache."""

from __future__ import annotations

import errno
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.plan.identity import DigestCache, cache_folder, canonical_json, content_digest, digest

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_one_text_for_one_value() -> None:
    assert canonical_json({"b": 1, "a": [Fraction(1, 4), None, True]}) == '{"a":["1/4",null,true],"b":1}'
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2.0, "a": 1.0})
    assert canonical_json((1, 2)) == canonical_json([1, 2])
    assert canonical_json(-0.0) == canonical_json(0)
    assert canonical_json({3, 1, 2}) == "[1,2,3]"


@pytest.mark.parametrize(
    "pair", [(True, 1), (False, 0), ("1", 1), (None, ""), (1e-3, 1e-4), (0.1, 0.1 + 2**-56), ([], {})]
)
def test_different_values_have_different_texts(pair: tuple[object, object]) -> None:
    assert canonical_json(pair[0]) != canonical_json(pair[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_is_no_number_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="finite"):
        canonical_json(bad)


@pytest.mark.parametrize("bad", [{1: 2}, object(), b"x"])
def test_what_has_no_canonical_form_is_refused(bad: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(bad)


@given(VALUES)
def test_the_text_reads_back_as_an_equal_value(value: object) -> None:
    again = json.loads(canonical_json(value))
    assert again == value
    assert digest(again) == digest(value)


def _old(file: Path) -> None:
    os.utime(file, (1_000_000_000, 1_000_000_000))


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.bin").write_bytes(b"abc")
        (tmp_path / name / "b.bin").write_bytes(b"")
    assert content_digest(tmp_path / "one") == content_digest(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a.bin").rename(tmp_path / "two" / "sub" / "c.bin")
    assert content_digest(tmp_path / "one") != content_digest(tmp_path / "two")


def test_the_cache_spares_a_second_reading_and_sees_a_change(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights.bin", tmp_path / "cache.json"
    file.write_bytes(b"one")
    _old(file)
    first = content_digest(file, DigestCache(cache))
    about = file.stat()
    noted = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
    cache.write_text(json.dumps({str(file): [*noted, "a" * 64]}))
    assert content_digest(file, DigestCache(cache)) == "a" * 64  # only a cached digest can give this answer
    # The same size and time with other bytes, as copying tools leave them that keep times.
    file.write_bytes(b"two")
    _old(file)
    assert content_digest(file, DigestCache(cache)) not in (first, "a" * 64)


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_what_cannot_be_read_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "weights").write_bytes(b"abc")
    real = getattr(os, call)

    def broken(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("sub" if call == "scandir" else "model"):
            raise OSError(errno.EIO, "Input/output error", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, broken)
    with pytest.raises(OSError, match="Input/output"):
        content_digest(tmp_path / "model")


def test_a_file_written_a_moment_ago_is_not_trusted_to_its_time(tmp_path: Path) -> None:
    file, cache = tmp_path / "rows.json", tmp_path / "cache.json"
    file.write_bytes(b"one")
    stamp = file.stat().st_mtime_ns
    first = content_digest(file, DigestCache(cache))
    file.write_bytes(b"two")
    os.utime(file, ns=(stamp, stamp))
    assert content_digest(file, DigestCache(cache)) != first


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b'{"PATH": [1, 2]}', b'{"PATH": [3, 1, 1, "zz"]}', b"\xff\xfe", b"[" * 9999]
)
def test_a_damaged_cache_costs_only_time(tmp_path: Path, damage: bytes) -> None:
    file, cache = tmp_path / "a", tmp_path / "cache.json"
    file.write_bytes(b"abc")
    _old(file)
    right = content_digest(file, DigestCache(tmp_path / "other.json"))
    cache.write_bytes(damage.replace(b"PATH", str(file).encode()))
    assert content_digest(file, DigestCache(cache)) == right
    assert json.loads(cache.read_text())[str(file)][3] == right


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "a").write_bytes(b"abc")
    _old(tmp_path / "a")
    cache = DigestCache(tmp_path / "file" / "cache.json")
    assert content_digest(tmp_path / "a", cache) == content_digest(tmp_path / "a", cache)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        content_digest(tmp_path / "nothing")


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does where nobody knows the user
    with pytest.raises(UsageError, match="no home folder; set HOME"):
        cache_folder()
