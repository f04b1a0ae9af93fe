"""What LlamaIndex's query engine and retriever add to `MemoryModel.query` and `search`, events included.

Both are timed in one and the same call, around the adapter and around the memory inside it: neither the
machine's mood nor the length of an answer enters the difference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from common import arguments, report, texts
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import NullEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import Document

from msa_memory import MemoryModel
from msa_memory.integrations.llama_index import MSAIndex


def main() -> None:
    """Time every question both ways."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(NullEventHandler())
    dispatcher.add_span_handler(SimpleSpanHandler())
    with MemoryModel.open(device=options.device) as memory:
        index = MSAIndex.from_documents(
            [
                Document(text=text, id_=str(number))
                for number, text in enumerate(texts(options.documents, 60))
            ],
            memory,
        )
        questions = [" ".join(text.split()[:12]) for text in texts(options.runs + 1, 200)]
        engine = index.as_query_engine(max_new_tokens=options.new_tokens)
        retriever = index.as_retriever()
        figures = {
            "query_engine": overhead(memory, "query", engine.query, questions),
            "retriever": overhead(memory, "search", retriever.retrieve, questions),
        }
    report("llama_index", options, {"documents": options.documents, **figures})


def overhead(
    memory: MemoryModel, verb: str, adapter: Callable[[str], object], questions: list[str]
) -> dict[str, float]:
    """Medians over the questions, the first of which only warms up; times in seconds."""
    inside: list[float] = []
    call = getattr(memory, verb)

    def timed(*given: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = call(*given, **options)
        inside.append(time.perf_counter() - started)
        return found

    setattr(memory, verb, timed)
    outside = []
    for question in questions:
        started = time.perf_counter()
        adapter(question)
        outside.append(time.perf_counter() - started)
    delattr(memory, verb)
    added = [whole - part for whole, part in zip(outside[1:], inside[1:], strict=True)]
    return {
        "memory_s": statistics.median(inside[1:]),
        "added_s": statistics.median(added),
        "most_added_s": max(added),
        "overhead_percent": 100 * statistics.median(a / b for a, b in zip(added, inside[1:], strict=True)),
    }


if __name__ == "__main__":
    main()
