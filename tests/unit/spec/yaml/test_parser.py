"""YAML to nodes: scalars as users mean them, positions, and hostile files refused in time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.spec.yaml.parser import MAX_NODES, read_tree, read_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("2e-5", 2e-5),
        ("1E3", 1e3),
        ("3.0e-3", 3e-3),
        (".5", 0.5),
        ("-1.5", -1.5),
        ("010", 10),
        ("0x10", 16),
        ("1_000", 1000),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        ("1/4", "1/4"),
        ("50%", "50%"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 1", "1"),
        ("!!int 1", 1),
        ("e3", "e3"),
        ("1e", "1e"),
        ("+", "+"),
        (".", "."),
        ("zero2", "zero2"),
        (".inf", math.inf),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    node = read_tree(f"a: {text}".encode(), "f.yaml").value["a"]
    assert node.value == value
    assert type(node.value) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans())
def test_numbers_come_back_exactly(value: float) -> None:
    written = str(value).lower()
    assert read_tree(f"a: {written}".encode(), None).plain() == {"a": value}


def test_every_value_and_key_has_its_place() -> None:
    root = read_tree(b"a: 1\nbb:\n  - x\n  - {c: 2.0}\n", "f.yaml")
    assert root.value["a"].mark == ("f.yaml", 1, 4)
    assert root.keys["bb"] == ("f.yaml", 2, 1)
    inner = root.at(("bb", 1))
    assert inner is not None
    assert inner.keys["c"] == ("f.yaml", 4, 6)
    assert inner.value["c"].mark == ("f.yaml", 4, 9)
    assert inner.value["c"].written() == "2.0"


def test_anchors_and_merge_keys_work() -> None:
    text = b"base: &b {x: 1, y: 2}\none: {<<: *b, y: 3}\ntwo: {y: 4, <<: [*b, {z: 5}]}\nlist: [*b, *b]\n"
    assert read_tree(text, None).plain() == {
        "base": {"x": 1, "y": 2},
        "one": {"x": 1, "y": 3},
        "two": {"x": 1, "y": 4, "z": 5},
        "list": [{"x": 1, "y": 2}, {"x": 1, "y": 2}],
    }


def test_byte_order_mark_is_ignored() -> None:
    assert read_tree(b"\xef\xbb\xbfa: 1", None).plain() == {"a": 1}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40))

HOSTILE = [
    ("nested brackets", b"a: " + b"[" * 100_000, "nested deeper than 32", (1, 35)),
    ("closed brackets", b"a: " + b"[" * 100_000 + b"]" * 100_000, "nested deeper than 32", (1, 35)),
    ("nested mappings", b"{a: " * 100_000, "nested deeper than 32", None),
    ("nested lists", b"- " * 400_000, "nested deeper than 32", None),
    ("indented", b"\n".join(b" " * i + b"a:" for i in range(1000)), "nested deeper than 32", (33, 33)),
    ("alias bomb", BOMB.encode(), f"more than {MAX_NODES} values", None),
    ("merge bomb", MERGE_BOMB.encode(), f"more than {MAX_NODES} values", None),
    ("many values", b"a: [" + b"1," * 400_000 + b"]", f"more than {MAX_NODES} values", None),
    ("over a megabyte", b"a: " + b"x" * 1_000_001, "more than 1 MB", None),
    ("open quote", b'a: "' + b"x" * 900_000, "not valid YAML", None),
    ("long key", b"? " * 300_000, "a key must be text", (1, 3)),
    ("open braces", b"{" * 300_000, "a key must be text", (1, 2)),
    ("recursive alias", b"a: &a [*a]", "inside its own anchor", (1, 8)),
    ("unknown alias", b"a: *b", "no anchor &b", (1, 4)),
    ("not UTF-8", b"a: 1\nbc: \xff", "byte 0xff is not UTF-8", (2, 5)),
    ("UTF-16", "a: 1".encode("utf-16"), "byte 0xff is not UTF-8", (1, 1)),
    ("NUL", b"a: 1\nb: x\x00", "U+0000", (2, 5)),
    ("escape", b"a: \x1b[31m", "U+001B", (1, 4)),
    ("NUL written as an escape", b'a: 1\nextends: "\\0"', "U+0000", (2, 10)),
    ("escape as an escape in a key", b'"\\e[31m": 1', "U+001B", (1, 1)),
    ("two documents", b"a: 1\n---\nb: 2\n", "second document", (2, 1)),
    ("python object", b"a: !!python/object/apply:os.system [ls]", "tag !!python/object/apply:os.system", (1, 4)),
    ("custom tag", b"a: !include x.yaml", "tag !include", (1, 4)),
    ("set tag", b"a: !!set {x}", "tag !!set", (1, 4)),
    ("empty", b"", "empty", None),
    ("comment only", b"# nothing\n", "empty", None),
    ("list at the root", b"- a\n- b\n", "mapping of keys, got a list", (1, 1)),
    ("scalar at the root", b"hello\n", "mapping of keys, got a text", (1, 1)),
    ("key that is a number", b"a: 1\n2: 3\n", "the key 2 is not text", (2, 1)),
    ("key that is a boolean", b"true: 3\n", "the key true is not text", (1, 1)),
    ("key that is a mapping", b"? {a: 1}\n: 2\n", "a key must be text", (1, 3)),
    ("bad merge", b"a: 1\nb: {<<: 3}\n", "`<<` takes a mapping", (2, 9)),
    ("duplicate key", b"a: 1\nb:\n  c: 1\n  c: 2\n", "`c` is written twice, first in line 3", (4, 3)),
    ("colon in a value", b"a: b: c", "not valid YAML", (1, 5)),
    ("tab", b"a:\n\tb: 1\n", "not valid YAML", (2, 1)),
    ("open bracket", b"a: [1, 2\nb: 3\n", "not valid YAML", (2, 2)),
    ("directives", b"%TAG ! tag:x\n" * 60_000, "not valid YAML", None),
    ("long number", b"a: " + b"9" * 900_000, None, None),
]


@pytest.mark.parametrize(
    ("data", "message", "place"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE]
)
@pytest.mark.timeout(30)
def test_hostile_files_are_reported(data: bytes, message: str | None, place: tuple[int, int] | None) -> None:
    if message is None:
        assert isinstance(read_tree(data, "f.yaml").value["a"].value, str)
    else:
        with pytest.raises(SpecError) as caught:
            read_tree(data, "f.yaml")
        error = caught.value.errors[0]
        assert message in error.message
        assert error.file == "f.yaml"
        assert "\n" not in error.message
        if place is not None:
            assert (error.line, error.column) == place


def test_duplicates_and_tags_are_reported_all_at_once() -> None:
    _, errors = read_value(b"a: 1\na: 2\nb: {c: 1, c: 2}\nd: !x 1\n", "f.yaml")
    assert [(error.path, error.line) for error in errors] == [("a", 2), ("b.c", 3), ("d", 4)]


def test_errors_are_bounded() -> None:
    _, errors = read_value(b"a:\n" * 100_000, "f.yaml")
    assert len(errors) <= 101


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_give_a_tree_or_an_error(data: bytes) -> None:
    try:
        root = read_tree(data, "f.yaml")
    except SpecError as error:
        assert error.errors
    else:
        assert root.is_mapping
