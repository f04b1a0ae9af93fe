"""LlamaIndex nodes and filters in a memory: what goes in comes out, filters match what LlamaIndex matches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.schema import (
    Document,
    ImageDocument,
    ImageNode,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from msa_memory import MemoryModel
from msa_memory.errors import InvalidDocumentError, InvalidFilterError
from msa_memory.integrations.llama_index import MSAIndex, to_where
from msa_memory.integrations.llama_index.nodes import from_document, from_source, to_item
from msa_memory.testing import open_memory
from msa_memory.types import Document as MemoryDocument
from msa_memory.types import Source

KEYS = ("colour", "year", "tags", "nested.key")
WORDS = ("red", "green", "dark green", "RED", "")
NUMBERS = (-1, 0, 7, 2024, 0.5, 7.0, 10**17)


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryModel]:
    with open_memory() as memory:
        yield memory


# nodes


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
shared_fields = {
    "id_": st.uuids().map(str),
    "metadata": st.dictionaries(text, values, max_size=4),
    "excluded_embed_metadata_keys": st.lists(text, max_size=2),
    "excluded_llm_metadata_keys": st.lists(text, max_size=2),
    "metadata_template": st.just("{key} = {value}"),
    "metadata_separator": st.sampled_from(["\n", "; "]),
    "relationships": st.dictionaries(
        st.sampled_from(
            [
                NodeRelationship.SOURCE,
                NodeRelationship.PREVIOUS,
                NodeRelationship.NEXT,
                NodeRelationship.PARENT,
            ]
        ),
        st.builds(Document, text=text, id_=st.uuids().map(str)).map(Document.as_related_node_info),
        max_size=3,
    ),
}
spoken = text.filter(str.strip)
nodes = st.one_of(
    st.builds(
        TextNode, text=spoken, start_char_idx=st.none() | st.integers(0, 9), mimetype=text, **shared_fields
    ),
    st.builds(Document, text=spoken, text_template=st.just("{content} / {metadata_str}"), **shared_fields),
    st.builds(IndexNode, text=spoken, index_id=text, **shared_fields),
    st.builds(
        Node,
        text_resource=st.builds(MediaResource, text=spoken, mimetype=st.just("text/markdown")),
        image_resource=st.none() | st.builds(MediaResource, url=st.just("https://example.org/a.png")),
        **shared_fields,
    ),
)


def as_stored(item: dict[str, Any]) -> MemoryDocument:
    """What a memory gives back for an item: its metadata has been through JSON."""
    moment = "2026-01-31T00:00:00Z"
    return MemoryDocument(
        id=item["id"], namespace="default", text=item["content"], passages=1, tokens=1,
        metadata=json.loads(json.dumps(item["metadata"])),
        timestamp=moment, created_at=moment, updated_at=moment,
    )  # fmt: skip


@given(nodes)
def test_a_node_comes_back_as_it_went_in(node: Any) -> None:
    back = from_document(as_stored(to_item(node)))
    assert type(back) is type(node)
    assert back == node
    assert back.get_content(MetadataMode.ALL) == node.get_content(MetadataMode.ALL)
    assert back.hash == node.hash


@given(nodes)
def test_the_same_node_makes_the_same_item(node: Any) -> None:
    assert to_item(node) == to_item(type(node).model_validate(node.model_dump()))


def test_every_kind_survives_a_real_memory(memory: MemoryModel) -> None:
    source = Document(text="Whole.", id_="whole", metadata={"title": "T"})
    written = [
        source,
        TextNode(
            text="Part.",
            id_="part",
            metadata={"tags": ["a", "b"], "empty": []},
            start_char_idx=3,
            end_char_idx=8,
            relationships={NodeRelationship.SOURCE: source.as_related_node_info()},
        ),
        IndexNode(text="Stands for more.", id_="pointer", index_id="table-1", obj=object()),
        Node(id_="node", text_resource=MediaResource(text="Resource.", mimetype="text/markdown")),
    ]
    index = MSAIndex(memory)
    index.upsert(written)
    back = index.get_nodes(["whole", "part", "pointer", "node"])
    assert isinstance(written[2], IndexNode)
    written[2].obj = None  # never stored: a live object is not the memory's
    assert back == written


def test_embeddings_are_left_behind() -> None:
    item = to_item(TextNode(text="x", id_="x", embedding=[0.1] * 1536))
    assert len(json.dumps(item)) < 1000


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (Document(text="  ", id_="blank"), "'blank'.*has no text"),
        (ImageNode(text="caption", id_="picture"), "'picture' is a ImageNode"),
        (ImageDocument(text="caption", id_="photo"), "'photo' is a ImageDocument"),
        (Node(id_="mixed", text_resource=MediaResource(text="t"), audio_resource=MediaResource(data=b"RIFF")),
         "'mixed'.*carries an image, sound or film"),
        (TextNode(text="x", id_="taken", metadata={"_llama_index": 1}), "'taken'.*reserved"),
    ],
)  # fmt: skip
def test_what_a_memory_cannot_hold_is_refused_by_name(memory: MemoryModel, node: Any, message: str) -> None:
    before = memory.count()
    with pytest.raises(InvalidDocumentError, match=message):
        MSAIndex(memory).upsert([TextNode(text="Fine."), node])
    assert memory.count() == before


def source(**fields: Any) -> Source:
    given = {"id": "d", "passage": 3, "start": 4, "end": 9, "text": "brown", "score": 0.5, "metadata": {}}
    return Source(**{**given, "timestamp": "2026-01-31T00:00:00Z", **fields})


def test_a_source_of_a_document_is_a_text_node_of_it() -> None:
    document = Document(text="The brown fox", id_="d", metadata={"a": 1}, excluded_llm_metadata_keys=["a"])
    found = from_source(source(metadata=to_item(document)["metadata"]))
    assert (found.node_id, found.text, found.score) == ("d", "brown", 0.5)
    assert type(found.node) is TextNode
    assert found.node.metadata == {"a": 1}
    assert found.node.ref_doc_id == "d"
    assert (found.node.start_char_idx, found.node.end_char_idx) == (4, 9)
    assert document.text[4:9] == found.text


def test_a_source_of_a_piece_is_placed_in_the_whole() -> None:
    whole = Document(text="It was the brown fox", id_="w")
    piece = TextNode(
        text="the brown fox",
        id_="p",
        start_char_idx=7,
        end_char_idx=20,
        relationships={NodeRelationship.SOURCE: whole.as_related_node_info()},
    )
    found = from_source(source(id="p", metadata=to_item(piece)["metadata"]))
    assert isinstance(found.node, TextNode)
    assert found.node.ref_doc_id == "w"
    assert whole.text[found.node.start_char_idx : found.node.end_char_idx] == "brown"


def test_what_was_added_without_llama_index_is_readable_too() -> None:
    found = from_source(source(metadata={"speaker": "Ada"}))
    assert (found.node.ref_doc_id, found.node.metadata) == ("d", {"speaker": "Ada"})


@given(
    st.dictionaries(st.sampled_from(["_llama_index", "a"]), values | st.fixed_dictionaries(
        {}, optional={"type": st.sampled_from(["TextNode", "Document", "Oops", 1]),
                      "fields": values | values.map(json.dumps) | st.just("[" * 50_000)},
    ))
)  # fmt: skip
def test_metadata_that_only_looks_like_ours_does_no_harm(metadata: dict[str, Any]) -> None:
    """Whoever may write a document must not be able to break what reads it."""
    found = from_source(source(id="forged", metadata=metadata))
    assert (found.node_id, found.text) == ("forged", "brown")
    assert {key: value for key, value in found.metadata.items() if key == "a"} == {
        key: value for key, value in metadata.items() if key == "a"
    }


# filters


def documents() -> list[dict[str, Any]]:
    """Metadata of many kinds: every value beside every other."""
    kinds: list[Any] = [*WORDS, *NUMBERS, None, [], ["red"], ["red", "green"], [7, 0.5], ["dark green", ""]]
    rows = [
        {"colour": kind, "year": kinds[-1 - place], "tags": kinds[place // 2]}
        for place, kind in enumerate(kinds)
    ]
    return [*rows, {}, {"nested": {"key": "red"}}, {"nested": {"key": 7}}]


@pytest.fixture(scope="module")
def shelf() -> Iterator[tuple[MemoryModel, dict[str, dict[str, Any]]]]:
    rows = {f"d{number}": metadata for number, metadata in enumerate(documents())}
    with open_memory() as memory:
        MSAIndex(memory).upsert([TextNode(text="x", id_=id, metadata=row) for id, row in rows.items()])
        yield memory, rows


scalars = st.sampled_from([*WORDS, *NUMBERS])
lists = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3) | st.lists(
    st.sampled_from([number for number in NUMBERS if isinstance(number, int)]), min_size=1, max_size=3
)
LIST_OPERATORS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
UNKNOWN = (FilterOperator.TEXT_MATCH_INSENSITIVE,)


def comparisons() -> st.SearchStrategy[MetadataFilter]:
    def of(operator: FilterOperator) -> st.SearchStrategy[MetadataFilter]:
        value = lists if operator in LIST_OPERATORS else scalars
        return st.builds(MetadataFilter, key=st.sampled_from(KEYS), value=value, operator=st.just(operator))

    return st.sampled_from([operator for operator in FilterOperator if operator not in UNKNOWN]).flatmap(of)


def groups(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[MetadataFilters]:
    return st.builds(
        MetadataFilters,
        filters=st.lists(inner, max_size=3),
        condition=st.sampled_from([*FilterCondition, None]),
    )


def looked_up(metadata: dict[str, Any], key: str) -> Any:
    value: Any = metadata
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def expected(filters: MetadataFilters | MetadataFilter, metadata: dict[str, Any]) -> bool:
    """LlamaIndex's own test of one filter, combined here; comparing what has no order is no match."""
    if isinstance(filters, MetadataFilter):
        flat = {filters.key: looked_up(metadata, filters.key)}
        try:
            return build_metadata_filter_fn(lambda _: flat, MetadataFilters(filters=[filters]))("")
        except TypeError:
            return False
    parts = [
        expected(part, metadata)
        for part in filters.filters
        if not isinstance(part, MetadataFilters) or to_where(part) is not None
    ]
    if not parts:
        return True
    match filters.condition:
        case FilterCondition.OR:
            return any(parts)
        case FilterCondition.NOT:
            return not any(parts)
    return all(parts)


def matching(memory: MemoryModel, filters: MetadataFilters) -> set[str]:
    return {document.id for document in memory.list(to_where(filters), limit=1000)}


@pytest.mark.parametrize("operator", [operator for operator in FilterOperator if operator not in UNKNOWN])
def test_every_comparison_with_every_value(
    shelf: tuple[MemoryModel, dict[str, dict[str, Any]]], operator: FilterOperator
) -> None:
    memory, rows = shelf
    compared = [list(WORDS), ["red"], [7], [0, 2024]] if operator in LIST_OPERATORS else [*WORDS, *NUMBERS]
    for key in KEYS:
        for value in compared:
            one = MetadataFilter(key=key, value=value, operator=operator)
            found = matching(memory, MetadataFilters(filters=[one]))
            assert found == {id for id, metadata in rows.items() if expected(one, metadata)}, one


@settings(max_examples=60)
@given(filters=groups(comparisons() | groups(comparisons())))
def test_filters_match_what_llama_index_matches(
    shelf: tuple[MemoryModel, dict[str, dict[str, Any]]], filters: MetadataFilters
) -> None:
    memory, rows = shelf
    wanted = {id for id, metadata in rows.items() if expected(filters, metadata)}
    assert matching(memory, filters) == wanted


def test_no_filter_is_no_filter() -> None:
    assert to_where(None) is None
    assert to_where(MetadataFilters(filters=[])) is None


@pytest.mark.parametrize(
    ("operator", "value", "message"),
    [
        (FilterOperator.TEXT_MATCH_INSENSITIVE, "red", "compares exactly"),
        (FilterOperator.ANY, "red", "expected a list"),
        (FilterOperator.ALL, [], "expected a list with at least one"),
    ],
)
def test_a_filter_that_cannot_be_applied_is_an_error(
    operator: FilterOperator, value: Any, message: str
) -> None:
    with pytest.raises(InvalidFilterError, match=message):
        to_where(MetadataFilters(filters=[MetadataFilter(key="colour", value=value, operator=operator)]))
