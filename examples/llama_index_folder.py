"""A LlamaIndex query engine over a folder of files, kept in step with the folder.

Run it with `python examples/llama_index_folder.py [FOLDER [QUESTION ...]]`; without a folder it writes a few
notes of its own and changes them to show what follows. Needs `pip install 'msa-memory[llama-index]'`, no key.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from llama_index.core import SimpleDirectoryReader
from llama_index.core.vector_stores import FilterOperator, MetadataFilter, MetadataFilters

from msa_memory import MemoryModel
from msa_memory.integrations.llama_index import MSAIndex, MSAQueryEngine

NOTES = {
    "house.md": "The spare key of the boat house hangs behind the green door. The alarm code is 4711.",
    "garden.md": "The apple trees are pruned in March. The roses get coffee grounds every second week.",
    "boat.md": "The boat is called Minerva. Her engine needs two litres of oil before the season starts.",
}


def main() -> None:
    """Read a folder, ask about it, change it, ask again."""
    with tempfile.TemporaryDirectory(prefix="msa-memory-demo-") as scratch:
        given = len(sys.argv) > 1
        folder = Path(sys.argv[1]) if given else write_notes(Path(scratch) / "notes")
        with MemoryModel.open(Path(scratch) / "agent-memory") as memory:
            index = MSAIndex(memory)
            follow(index, folder)
            engine = index.as_query_engine(max_new_tokens=32)
            for question in sys.argv[2:] or ["Where is the spare key?", "What is the boat called?"]:
                show(engine, question)
            if not given:
                change(index, folder)


def write_notes(folder: Path) -> Path:
    """The folder with the sample notes in it."""
    folder.mkdir()
    for name, text in NOTES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def follow(index: MSAIndex, folder: Path) -> None:
    """Make the memory hold what the folder holds: new, changed and deleted files."""
    documents = SimpleDirectoryReader(str(folder), recursive=True, filename_as_id=True).load_data()
    index.refresh_ref_docs(documents, show_progress=True)
    present = {document.node_id for document in documents}
    gone = [document.id for document in index.memory.list(limit=100_000) if document.id not in present]
    for id in gone:
        index.delete_ref_doc(id)
    print(f"{len(documents)} files in the memory, {len(gone)} no longer there")


def change(index: MSAIndex, folder: Path) -> None:
    """One file changes, one goes; a filter keeps to one file."""
    (folder / "house.md").write_text("The spare key now lies in the blue pot.", encoding="utf-8")
    (folder / "garden.md").unlink()
    follow(index, folder)
    show(index.as_query_engine(max_new_tokens=32), "Where is the spare key?")
    boat_only = MetadataFilters(
        filters=[MetadataFilter(key="file_name", value="boat.md", operator=FilterOperator.EQ)]
    )
    show(index.as_query_engine(max_new_tokens=32, filters=boat_only), "How much oil does the engine need?")


def show(engine: MSAQueryEngine, question: str) -> None:
    """Print an answer with the files it was read from."""
    response = engine.query(question)
    print(f"\nQ: {question}\nA: {response}")
    for node in response.source_nodes:
        print(f"   {node.score:.2f} {node.metadata['file_name']}: {' '.join(node.text.split())[:80]}")


if __name__ == "__main__":
    main()
