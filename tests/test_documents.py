"""What callers hand in: checked, normalised, or refused by name before anything is stored."""

import json
import math
from collections import OrderedDict
from datetime import UTC, date, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msa_memory.config import MemoryConfig
from msa_memory.documents import check_name, check_question, read_item, read_metadata
from msa_memory.errors import InvalidDocumentError, LimitError

CONFIG = MemoryConfig()
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda text: "\0" not in text),
    lambda children: (
        st.lists(children, max_size=4)
        | st.dictionaries(st.text(max_size=5).filter(lambda text: "\0" not in text), children, max_size=4)
    ),
    max_leaves=12,
)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


def endless() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def test_a_string_is_an_item() -> None:
    item = read_item("Bob lives in Oslo.", CONFIG)
    assert (item.text, item.metadata, item.timestamp, item.source) == ("Bob lives in Oslo.", {}, None, None)
    assert item.id != read_item("Bob lives in Oslo.", CONFIG).id


def test_a_mapping_is_an_item() -> None:
    item = read_item(
        MappingProxyType(
            {"content": " x ", "id": "a/b", "metadata": {"n": [1]}, "source": "chat", "trust": "low"}
        ),
        CONFIG,
    )
    assert (item.text, item.id, item.metadata, item.source, item.trust) == (
        " x ",
        "a/b",
        {"n": [1]},
        "chat",
        "low",
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "content is None (NoneType)"),
        (5, "content is 5 (int)"),
        (b"bytes", "content is b'bytes' (bytes)"),
        (["x"], "content is ['x'] (list)"),
        ("", "content is empty"),
        (" \n\t\u2003", "content is empty"),
        ("a\x00b", "content contains a NUL character at 1"),
        ("ok \ud800", "half a surrogate pair at character 3"),
    ],
)
def test_unusable_content_is_named(content: object, says: str) -> None:
    with pytest.raises(InvalidDocumentError) as caught:
        read_item({"content": content}, CONFIG)
    assert says in str(caught.value)


@pytest.mark.parametrize("item", [None, 5, b"text", ["text"], object()])
def test_unusable_items_are_named(item: object) -> None:
    with pytest.raises(InvalidDocumentError, match="expected a string or a mapping with content"):
        read_item(item, CONFIG)


def test_unknown_keys_are_named() -> None:
    with pytest.raises(InvalidDocumentError, match=r"unknown keys \['5', 'contents'\]"):
        read_item({"contents": "x", 5: 1}, CONFIG)


def test_content_has_a_limit() -> None:
    config = MemoryConfig(max_document_chars=10)
    assert read_item("x" * 10, config).text == "x" * 10
    with pytest.raises(LimitError, match="11 characters; the limit is 10"):
        read_item("x" * 11, config)


@pytest.mark.parametrize("value", [5, b"id", "", "x" * 513, "a\0b", "\udfff", None, True])
def test_unusable_names_are_refused(value: object) -> None:
    with pytest.raises(InvalidDocumentError, match=r"^id "):
        check_name("id", value)


@pytest.mark.parametrize("value", ["a", "x" * 512, "ö/日 .", "'; DROP TABLE documents", "..", " "])
def test_any_other_string_is_a_name(value: str) -> None:
    assert check_name("id", value) == value


@pytest.mark.parametrize("question", [None, 5, b"Who?", "", "  \n", "Who\0?", "Who \ud800?"])
def test_unusable_questions_are_refused(question: object) -> None:
    with pytest.raises(InvalidDocumentError, match="the question"):
        check_question(question)


# dates


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T10:00:00", datetime(2026, 1, 31, 10, tzinfo=UTC)),
        ("2026-01-31T10:00:00+02:00", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31T10:00:00Z", datetime(2026, 1, 31, 10, tzinfo=UTC)),
        (datetime(2026, 1, 31, 10), datetime(2026, 1, 31, 10, tzinfo=UTC)),
        (
            datetime(2026, 1, 31, 10, tzinfo=timezone(timedelta(hours=-5))),
            datetime(2026, 1, 31, 15, tzinfo=UTC),
        ),
        (None, None),
    ],
)
@pytest.mark.parametrize("field", ["timestamp", "expires_at"])
def test_dates_become_utc(field: str, given: object, expected: datetime | None) -> None:
    found = getattr(read_item({"content": "x", field: given}, CONFIG), field)
    assert found == expected
    assert found is None or found.tzinfo is UTC


@pytest.mark.parametrize(
    "value",
    [
        "yesterday",
        "2026-13-01",
        "31.01.2026",
        "",
        5,
        1769853600.0,
        date(2026, 1, 31),
        "0001-01-01T00:00:00+05:00",
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
    ],
)
@pytest.mark.parametrize("field", ["timestamp", "expires_at"])
def test_unusable_dates_are_named(field: str, value: object) -> None:
    with pytest.raises(InvalidDocumentError, match=f"^{field} "):
        read_item({"content": "x", field: value}, CONFIG)


# metadata


@given(st.dictionaries(st.text(max_size=5).filter(lambda text: "\0" not in text), JSON, max_size=4))
def test_metadata_comes_back_as_json_would_give_it(metadata: dict[str, Any]) -> None:
    assert read_metadata(metadata, CONFIG) == json.loads(json.dumps(metadata))


def test_mappings_and_tuples_are_metadata_too() -> None:
    value = MappingProxyType({"a": (1, 2), "b": OrderedDict(c=MappingProxyType({"d": None}))})
    assert read_metadata(value, CONFIG) == {"a": [1, 2], "b": {"c": {"d": None}}}
    assert read_metadata(None, CONFIG) == {}


def test_metadata_is_a_copy() -> None:
    given_metadata = {"tags": ["a"]}
    found = read_metadata(given_metadata, CONFIG)
    given_metadata["tags"].append("b")
    assert found == {"tags": ["a"]}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("text", "expected a mapping"),
        ([("a", 1)], "expected a mapping"),
        ({5: "x"}, "the key 5 (int)"),
        ({None: "x"}, "the key None (NoneType)"),
        ({"a": [{True: 1}]}, "the key True (bool)"),
        ({"a": math.nan}, "not JSON"),
        ({"a": [math.inf]}, "not JSON"),
        ({"a": {1, 2}}, "not JSON"),
        ({"a": datetime.now(UTC)}, "not JSON"),
        ({"a": b"x"}, "not JSON"),
        ({"a": 10**5000}, "not JSON"),
        ({"a": "\ud800"}, "half a surrogate pair"),
        ({"\ud800": 1}, "half a surrogate pair"),
        ({"a": ["x\0"]}, "NUL"),
        ({"\0": 1}, "NUL"),
    ],
)
def test_unusable_metadata_is_named(metadata: object, says: str) -> None:
    with pytest.raises(InvalidDocumentError) as caught:
        read_metadata(metadata, CONFIG)
    assert says in str(caught.value)


@pytest.mark.parametrize("metadata", [nested(33), endless(), {"a": nested(40)}])
def test_metadata_nests_only_so_deep(metadata: dict[str, Any]) -> None:
    with pytest.raises(LimitError, match="nested deeper than 32"):
        read_metadata(metadata, CONFIG)


def test_metadata_at_the_limits_is_kept() -> None:
    assert read_metadata(nested(32), CONFIG) == nested(32)
    config = MemoryConfig(max_metadata_bytes=20)
    assert read_metadata({"a": "x" * 11}, config)
    with pytest.raises(LimitError, match="takes 21 bytes; the limit is 20"):
        read_metadata({"a": "x" * 12}, config)
    with pytest.raises(LimitError, match="takes 23 bytes"):
        read_metadata({"a": "é" * 7}, config)
