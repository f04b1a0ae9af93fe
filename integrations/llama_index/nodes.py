"""LlamaIndex nodes as a memory's documents, and sources and documents as nodes.

A node's id, text and metadata become the document's own. What else a node holds (its kind, relationships,
templates, offsets) is kept under one reserved metadata key, so that a node comes back as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    IndexNode,
    MediaResource,
    MetadataMode,
    Node,
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)

from msa_memory.errors import InvalidDocumentError
from msa_memory.types import Document as MemoryDocument
from msa_memory.types import Source

__all__ = [
    "EMPTY_LISTS",
    "REF_DOC_ID",
    "RESERVED",
    "from_document",
    "from_source",
    "from_sources",
    "ref_doc_id",
    "to_item",
]

RESERVED = "_llama_index"
"""The metadata key that holds what only LlamaIndex knows of a node."""
REF_DOC_ID = f"{RESERVED}.ref_doc_id"
EMPTY_LISTS = f"{RESERVED}.empty"
"""Where ``where`` finds the keys whose value is an empty list: those have no value to compare with."""

_KINDS: dict[str, type[BaseNode]] = {
    kind.class_name(): kind for kind in (Document, IndexNode, Node, TextNode)
}
_ELSEWHERE = {"id_", "metadata", "embedding", "text", "obj", "class_name"}
_RESOURCE = "text_resource"


def ref_doc_id(node: BaseNode) -> str:
    """The id of the LlamaIndex document a node was cut from; its own if it is whole."""
    return node.ref_doc_id or node.node_id


def to_item(node: BaseNode) -> dict[str, Any]:
    """A node as an item of ``add_many``.

    Raises:
        InvalidDocumentError: no text, something that is not text, metadata under the reserved key, or a class
            that could not be restored.
    """
    kind = node.class_name()
    if _KINDS.get(kind) is not type(node):
        raise InvalidDocumentError(
            f"node {node.node_id!r} is a {type(node).__name__}; expected one of {', '.join(sorted(_KINDS))}"
        )
    text = node.get_content(MetadataMode.NONE)
    if not text.strip():
        raise InvalidDocumentError(
            f"node {node.node_id!r} ({kind}) has no text; leave out nodes that hold only images or nothing"
        )
    if isinstance(node, Node) and any(resource is not None and resource.data for resource in _media(node)):
        raise InvalidDocumentError(
            f"node {node.node_id!r} ({kind}) carries an image, sound or film; a memory holds text: "
            "keep those elsewhere and refer to them in the metadata"
        )
    if RESERVED in node.metadata:
        raise InvalidDocumentError(f"node {node.node_id!r} has metadata {RESERVED!r}, which is reserved")
    return {
        "id": node.node_id,
        "content": text,
        "metadata": {**node.metadata, RESERVED: _kept(node)},
    }


def from_document(document: MemoryDocument) -> BaseNode:
    """The node a document was added as; a LlamaIndex Document if it was added otherwise."""
    return _restored(document.id, document.text, document.metadata)


def from_source(source: Source) -> NodeWithScore:
    """A source as a node: the text that was read, its place in the document, its score.

    A whole Document comes back as a TextNode whose source is that Document, as from any LlamaIndex index.
    """
    node = _as_text_node(_restored(source.id, source.text, source.metadata))
    if isinstance(node, TextNode):
        offset = node.start_char_idx or 0
        node.start_char_idx, node.end_char_idx = offset + source.start, offset + source.end
    return NodeWithScore(node=node, score=source.score)


def from_sources(sources: tuple[Source, ...] | list[Source]) -> list[NodeWithScore]:
    """Sources as nodes, in their order."""
    return [from_source(source) for source in sources]


def _media(node: Node) -> tuple[MediaResource | None, ...]:
    return node.image_resource, node.audio_resource, node.video_resource


def _kept(node: BaseNode) -> dict[str, Any]:
    if isinstance(node, IndexNode):
        node = node.model_copy(update={"obj": None})  # what it stands for is not the memory's
    fields = {key: value for key, value in node.model_dump(mode="json").items() if key not in _ELSEWHERE}
    if isinstance(fields.get(_RESOURCE), dict):
        fields[_RESOURCE] = {**fields[_RESOURCE], "text": None}
    empty = sorted(key for key, value in node.metadata.items() if value == [])
    return {
        "type": node.class_name(),
        "ref_doc_id": ref_doc_id(node),
        "fields": json.dumps(fields, sort_keys=True, ensure_ascii=False),
        **({"empty": empty} if empty else {}),
    }


def _restored(id: str, text: str, metadata: Mapping[str, Any]) -> BaseNode:
    node = _node_from(id, metadata)
    if node is None:
        return Document(id_=id, text=text, metadata=dict(metadata))
    if isinstance(node, Node) and node.text_resource is not None:
        node.text_resource.text = text  # its other fields stay
    else:
        node.set_content(text)
    return node


def _node_from(id: str, metadata: Mapping[str, Any]) -> BaseNode | None:
    """The node without its text; None where this adapter did not write it: anybody may write metadata."""
    own = {key: value for key, value in metadata.items() if key != RESERVED}
    try:
        kept = metadata[RESERVED]
        fields = json.loads(kept["fields"])
        return _KINDS[kept["type"]].model_validate({**fields, "id_": id, "metadata": own})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def _as_text_node(node: BaseNode) -> BaseNode:
    if not isinstance(node, Document):
        return node
    source = node.source_node or RelatedNodeInfo(
        node_id=node.node_id, node_type=ObjectType.DOCUMENT, metadata=dict(node.metadata)
    )
    return TextNode(
        id_=node.node_id,
        text=node.get_content(MetadataMode.NONE),
        metadata=node.metadata,
        excluded_embed_metadata_keys=node.excluded_embed_metadata_keys,
        excluded_llm_metadata_keys=node.excluded_llm_metadata_keys,
        metadata_template=node.metadata_template,
        metadata_separator=node.metadata_separator,
        text_template=node.text_template,
        relationships={**node.relationships, NodeRelationship.SOURCE: source},
    )
