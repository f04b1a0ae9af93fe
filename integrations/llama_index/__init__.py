"""LlamaIndex: a memory as query engine, retriever, index, language model and memory block.

``pip install 'msa-memory[llama-index]'``. Each class translates LlamaIndex's types to ``MemoryModel``'s verbs
and back; what a memory does is decided there. Memories are opened and closed by the caller.
"""

from msa_memory.errors import MissingExtraError

try:
    import llama_index.core as _core  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "msa_memory.integrations.llama_index needs llama-index-core: pip install 'msa-memory[llama-index]'"
    ) from error

from msa_memory.integrations.llama_index.filters import to_where
from msa_memory.integrations.llama_index.index import MSAIndex, MSAMemoryWriter, stable_node_id
from msa_memory.integrations.llama_index.llm import MSALLM
from msa_memory.integrations.llama_index.memory_block import MSAMemoryBlock
from msa_memory.integrations.llama_index.query_engine import MSAQueryEngine
from msa_memory.integrations.llama_index.retriever import MSARetriever

__all__ = [
    "MSAIndex",
    "MSALLM",
    "MSAMemoryBlock",
    "MSAMemoryWriter",
    "MSAQueryEngine",
    "MSARetriever",
    "stable_node_id",
    "to_where",
]
