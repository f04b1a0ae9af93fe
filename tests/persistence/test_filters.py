"""The where filter against an evaluator written from the documentation alone, and its error messages."""

import itertools
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from msa_memory.errors import InvalidFilterError
from msa_memory.persistence import NewDocument, Store
from msa_memory.persistence.attributes import number_text
from msa_memory.persistence.filters import MAX_DEPTH, parse_filter

KEYS = ["a", "b", "a.b", "b.a", "", "é"]
STRINGS = [
    "",
    "a",
    "A",
    "ab",
    "b",
    "%",
    "_",
    "a%",
    "é",
    "e\u0301",
    "😀",
    "\uffff",
    "1",
    "true",
    "'; DROP TABLE documents; --",
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    10,
    -10,
    1.0,
    1.5,
    -1.5,
    -0.0,
    0.1,
    1e-9,
    2**53,
    2**53 + 1,
    float(2**53),
    2**63,
    -(2**70),
    1e300,
]
scalars = st.one_of(
    st.sampled_from(STRINGS), st.sampled_from(NUMBERS), st.booleans(), st.none(), st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
metadatas = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
comparable = scalars.filter(lambda value: value is not None and not isinstance(value, bool))
operators = st.one_of(
    st.tuples(st.sampled_from(["$eq", "$ne", "$contains"]), scalars),
    st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(scalars, max_size=4)),
    st.tuples(st.sampled_from(["$gt", "$gte", "$lt", "$lte"]), comparable),
    st.tuples(st.just("$exists"), st.booleans()),
)
conditions = st.lists(operators, min_size=1, max_size=2).map(dict)
conditions = conditions | conditions.map(lambda inner: {"$not": inner})
fields = st.dictionaries(st.sampled_from(KEYS), scalars | conditions, min_size=1, max_size=2)
filters = st.recursive(
    fields,
    lambda inner: st.one_of(
        st.builds(
            lambda name, parts: {name: parts},
            st.sampled_from(["$and", "$or"]),
            st.lists(inner, min_size=1, max_size=3),
        ),
        inner.map(lambda part: {"$not": part}),
    ),
    max_leaves=5,
)


def values_at(metadata: dict, path: str) -> Iterator[object]:
    """Everything a dotted path can mean: keys may hold dots themselves."""
    for key, value in metadata.items():
        if key == path:
            yield value
        if isinstance(value, dict) and path.startswith(f"{key}."):
            yield from values_at(value, path[len(key) + 1 :])


def kind(value: object) -> str:
    if isinstance(value, bool):
        return "boolean"
    return "number" if isinstance(value, int | float) else type(value).__name__


def same(left: object, right: object) -> bool:
    return kind(left) == kind(right) and left == right and not isinstance(left, list | dict)


def compare(value: object, operator: str, operand: object) -> bool:
    if operator == "$eq":
        return same(value, operand)
    if operator == "$in":
        return any(same(value, each) for each in operand)
    if operator == "$contains":
        if isinstance(value, list):
            return any(same(member, operand) for member in value)
        return isinstance(value, str) and isinstance(operand, str) and operand in value
    if kind(value) != kind(operand):
        return False
    return {
        "$gt": value > operand,
        "$gte": value >= operand,
        "$lt": value < operand,
        "$lte": value <= operand,
    }[operator]


def holds(metadata: dict, key: str, operator: str, operand: object) -> bool:
    found = list(values_at(metadata, key))
    match operator:
        case "$not":
            return not all(holds(metadata, key, inner, value) for inner, value in operand.items())
        case "$exists":
            return bool(found) == operand
        case "$ne":
            return not any(same(value, operand) for value in found)
        case "$nin":
            return not any(same(value, each) for value in found for each in operand)
    return any(compare(value, operator, operand) for value in found)


def matches(metadata: dict, where: dict) -> bool:
    def entry(key: str, value: object) -> bool:
        match key:
            case "$and":
                return all(matches(metadata, part) for part in value)
            case "$or":
                return any(matches(metadata, part) for part in value)
            case "$not":
                return not matches(metadata, value)
        tests = value if isinstance(value, dict) else {"$eq": value}
        return all(holds(metadata, key, operator, operand) for operator, operand in tests.items())

    return all(entry(key, value) for key, value in where.items())


@pytest.fixture(scope="module")
def bank() -> Iterator[Store]:
    with Store.open(None) as store:
        yield store


def found(bank: Store, metadatas: list[dict], *filters: dict | None, **fields: object) -> list[list[int]]:
    """Indices of the documents each filter finds."""
    name = uuid.uuid4().hex
    bank.add(
        [
            NewDocument(id=str(i), namespace=name, text="t", metadata=m, **fields)
            for i, m in enumerate(metadatas)
        ]
    )
    return [sorted(int(document.id) for document in bank.list(name, where)) for where in filters]


@settings(max_examples=150)
@given(documents=st.lists(metadatas, min_size=1, max_size=5), where=filters)
@example(documents=[{"a": 1}, {"a": True}, {"a": "1"}, {"a": 1.0}, {}], where={"a": {"$ne": 1}})
@example(documents=[{"a": 2**53}, {"a": 2**53 + 1}], where={"a": float(2**53)})
@example(documents=[{"a": {"b": 1}}, {"a.b": 1}], where={"a.b": 1})
@example(documents=[{"a": ["A", 1, None]}, {"a": "xAx"}], where={"a": {"$contains": "A"}})
@example(documents=[{"a": None}, {}], where={"a": None})
@example(documents=[{}, {"a": None}], where={"a": {"$gt": 0}, "$not": {"b": {"$exists": True}}})
def test_sql_agrees_with_the_documentation(bank, documents, where):
    expected = [index for index, metadata in enumerate(documents) if matches(metadata, where)]
    assert found(bank, documents, where) == [expected]


@pytest.mark.postgres
def test_postgresql_agrees_too(postgres_url, tmp_path):
    with Store.open(tmp_path / "bank", catalog_url=postgres_url) as bank:

        @settings(max_examples=100)
        @given(documents=st.lists(metadatas, min_size=1, max_size=5), where=filters)
        def check(documents, where):
            expected = [index for index, metadata in enumerate(documents) if matches(metadata, where)]
            assert found(bank, documents, where) == [expected]

        check()


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats(allow_nan=False, allow_infinity=False)),
        min_size=2,
    )
)
@example([10**23, 1e23])
@example([5e-324, 0, -5e-324, 1.7976931348623157e308, 10**400])
def test_number_texts_sort_as_numbers(numbers):
    for left, right in itertools.pairwise(numbers):
        assert (number_text(left) < number_text(right)) == (left < right)
        assert (number_text(left) == number_text(right)) == (left == right)


def test_document_fields(bank):
    name = uuid.uuid4().hex
    times = [datetime(2024, month, 1, tzinfo=UTC) for month in (1, 2, 3)]
    rows = [("x", "chat", None), ("y", "mail", "low"), ("z", None, "high")]
    same = {"namespace": name, "text": "t", "metadata": {"source": "meta"}}
    bank.add(
        [
            NewDocument(id=id, source=source, trust=trust, timestamp=time, **same)
            for (id, source, trust), time in zip(rows, times, strict=True)
        ]
    )

    def ids(where):
        return "".join(sorted(document.id for document in bank.list(name, where)))

    cases = [
        ({"source": "meta"}, "xyz"),
        ({"$source": "chat"}, "x"),
        ({"$source": {"$ne": "chat"}}, "yz"),
        ({"$source": {"$exists": False}}, "z"),
        ({"$source": {"$nin": ["mail"]}}, "xz"),
        ({"$source": {"$contains": "a"}}, "xy"),
        ({"$source": 3}, ""),
        ({"$source": {"$in": []}}, ""),
        ({"$source": {"$in": ["chat", 7, None]}}, "x"),
        ({"$trust": {"$gte": "low"}}, "y"),
        ({"$not": {"$trust": {"$gte": "low"}}}, "xz"),
        ({"$id": {"$in": ["x", "z"]}}, "xz"),
        ({"$timestamp": {"$gte": "2024-02-01"}}, "yz"),
        ({"$timestamp": {"$lt": times[1]}}, "x"),
        ({"$timestamp": {"$eq": "2024-03-01T01:00:00+01:00"}}, "z"),
        ({"$timestamp": {"$in": [times[0], "2024-02-01T00:00:00Z"]}}, "xy"),
        ({"$timestamp": {"$exists": True}}, "xyz"),
        ({"$or": [{"$id": "x"}, {"$trust": "high"}]}, "xz"),
    ]
    assert [(where, ids(where)) for where, _ in cases] == cases


def test_no_filter_is_everything(bank):
    assert found(bank, [{}, {"a": 1}], None, {}) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([("a", 1)], "list"),
        ("a", "str"),
        ({"a": {"$regex": "x"}}, r"\$regex.*\$contains"),
        ({"$where": 1}, r"\$where.*\$timestamp"),
        ({"a": {}}, "no operator"),
        ({"a": {"b": 1}}, r"dot: 'a\.b'"),
        ({"a": {"$in": "abc"}}, "list of values"),
        ({"a": {"$in": [[1]]}}, "list"),
        ({"a": [1]}, "list"),
        ({"a": {"$gt": None}}, "None"),
        ({"a": {"$lt": True}}, "True"),
        ({"a": {"$exists": 1}}, "True or False"),
        ({"a": float("nan")}, "nan"),
        ({"a": datetime(2024, 1, 1)}, "datetime"),
        ({"a": "\ud800"}, "surrogate"),
        ({"a": "x\0"}, "NUL"),
        ({"\0": 1}, "NUL"),
        ({1: 2}, "int"),
        ({"$and": []}, "empty"),
        ({"$or": {"a": 1}}, "list of filters"),
        ({"$or": [{}]}, "non-empty"),
        ({"$not": 3}, "not a filter"),
        ({"a": {"$not": 3}}, "expected operators"),
        ({"$timestamp": "yesterday"}, "ISO 8601"),
        ({"$timestamp": 5}, "ISO 8601"),
        ({"$timestamp": {"$contains": "2024"}}, "does not apply"),
        ({"a": {"$in": list(range(5000))}}, "4096"),
        ({str(i): i for i in range(300)}, "256"),
    ],
)
def test_malformed_filters_say_what_is_wrong(where, message):
    with pytest.raises(InvalidFilterError, match=message):
        parse_filter(where)


def nested(depth: int, name: str) -> dict:
    where: dict = {"a": 1}
    for _ in range(depth - 1):
        where = {"$not": where} if name == "$not" else {name: [where]}
    return where


@pytest.mark.parametrize("name", ["$and", "$or", "$not"])
def test_nesting_has_a_limit(bank, name):
    parse_filter(nested(MAX_DEPTH, name))
    found(bank, [{"a": 1}], nested(MAX_DEPTH, name))
    for depth in (MAX_DEPTH + 1, 5000):
        with pytest.raises(InvalidFilterError, match="16 levels"):
            parse_filter(nested(depth, name))
    inner: dict = {"$eq": 1}
    for _ in range(500):
        inner = {"$not": inner}
    with pytest.raises(InvalidFilterError, match="16 levels"):
        parse_filter({"a": inner})


def test_the_largest_filter_allowed_still_runs(bank):
    wide = {f"k{i}": {"$nin": ["x"] * 16} for i in range(256)}
    assert found(bank, [{"a": 1}], wide, {"$or": [{f"k{i}": i} for i in range(256)]}) == [[0], []]


def test_numbers_of_any_length(any_store, new):
    """As long as JSON holds them they compare exactly; longer ones are refused by name, never leaked."""
    huge = 10**400
    any_store.add([new(any_store, "huge", metadata={"n": huge}), new(any_store, "one", metadata={"n": 1})])
    assert [document.id for document in any_store.list("default", {"n": huge})] == ["huge"]
    assert [document.id for document in any_store.list("default", {"n": {"$lt": huge}})] == ["one"]
    assert len(any_store.visible("default", {"n": {"$gt": huge - 1}})) == 1
    for where in ({"n": 10**5000}, {"n": {"$in": [-(10**5000)]}}, {10**5000: 1}, {"n": {10**5000: 1}}):
        with pytest.raises(InvalidFilterError):
            any_store.count("default", where)
