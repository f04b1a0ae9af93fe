"""A memory of real documents and a conversation: fill it, ask it, change it, reopen it in a new process.

Run it with `make demo` or `python examples/quickstart.py [FOLDER]`. Everything happens on this machine:
the documents are the documentation that every Python installation carries.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msa_memory import Answer, MemoryModel

MODULES = (
    "array base64 bisect calendar collections colorsys configparser contextlib copy csv datetime difflib "
    "enum fileinput fnmatch fractions functools getpass glob gzip hashlib heapq hmac html itertools json "
    "keyword linecache locale logging math mimetypes operator os.path pathlib pprint queue random re sched "
    "secrets shelve shutil signal socket sqlite3 statistics string struct subprocess tempfile textwrap "
    "threading time timeit traceback types unicodedata urllib.parse uuid warnings wave weakref zipfile zlib"
).split()

CONVERSATION = (
    ("2026-03-02", "Ada", "I moved to Lisbon last week and I am still looking for a good bakery."),
    ("2026-03-02", "Ada", "My sister Ingrid is getting married in Bergen on the 14th of June."),
    ("2026-03-05", "Ada", "I adopted a grey cat today. Her name is Minerva."),
    ("2026-03-09", "Ada", "The vet says that Minerva is allergic to chicken."),
    ("2026-03-15", "Ada", "My flight to the wedding leaves on the 12th of June at 07:40 from gate 22."),
    ("2026-03-20", "Ada", "I started to learn the cello with a teacher called Mr. Okafor."),
    ("2026-04-01", "Ada", "The password hint of the old laptop is the name of our first dog, Biscuit."),
)

QUESTIONS = (
    "What does heapq.nsmallest return?",
    "Which function shortens a text to fit a given width?",
    "What is the name of Ada's cat?",
    "What is Minerva allergic to, according to the vet?",
    "Who teaches Ada the cello?",
)


def main() -> None:
    """Fill a memory, question it, change it, and look at it from a new process."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="msa-memory-demo-") as scratch:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "agent-memory"
        with MemoryModel.open(folder) as memory:
            fill(memory)
            print("\n== Questions")
            for question in QUESTIONS:
                show(question, memory.query(question))
            change(memory)
        print("\n== A new process opens the same folder", flush=True)
        subprocess.run([sys.executable, __file__, "--reopen", str(folder)], check=True)
    print(f"\nThe whole demo took {time.perf_counter() - started:.0f} s.")


def fill(memory: MemoryModel) -> None:
    """Add the documentation and the conversation."""
    documents = list(library_documents())
    begun = time.perf_counter()
    memory.add_many([*documents, *conversation()])
    seconds, stats = time.perf_counter() - begun, memory.stats
    print(
        f"Remembered {stats.documents} documents, {stats.tokens:,} tokens, in {seconds:.0f} s "
        f"({stats.tokens / seconds:,.0f} tokens/s); {stats.state_bytes / 1e6:.1f} MB of states."
    )


def change(memory: MemoryModel) -> None:
    """One fact changes, one is forgotten."""
    print("\n== A fact changes, another is forgotten")
    flight = "My flight to the wedding was changed: it leaves on the 13th of June at 09:15 from gate 4."
    memory.update("ada-5", flight)
    show("From which gate does Ada's flight leave?", memory.query("From which gate does Ada's flight leave?"))
    receipt = memory.forget("ada-7")
    print(f"forgot {list(receipt.ids)}: {receipt.counts}, {receipt.bytes_erased} bytes of states erased")


def reopen(folder: Path) -> None:
    """What a new process still knows, and what it no longer knows."""
    begun = time.perf_counter()
    with MemoryModel.open(folder) as memory:
        print(
            f"opened {memory.count()} documents in {time.perf_counter() - begun:.2f} s (model not yet loaded)"
        )
        for question in ("What is the name of Ada's cat?", "From which gate does Ada's flight leave?"):
            show(question, memory.query(question))
        question = "What is the password hint of the old laptop?"
        show(question, memory.query(question, where={"speaker": "Ada"}))
        print(f"versions of the flight: {[version.text for version in memory.history('ada-5')]}")
        problems = memory.verify()
        print(f"verify: {problems or 'all checksums and row hashes match'}")


def library_documents() -> Iterator[dict[str, Any]]:
    """Documentation of modules and their public functions and classes, as this Python ships it."""
    for name in MODULES:
        module = importlib.import_module(name)
        if module.__doc__:
            yield document(name, module.__doc__)
        for attribute in sorted(getattr(module, "__all__", ())):
            value = getattr(module, attribute, None)
            text = inspect.getdoc(value) if callable(value) else None
            if text and 80 <= len(text) <= 1200 and inspect.getmodule(value) is module:
                yield document(f"{name}.{attribute}", text)


def document(name: str, text: str) -> dict[str, Any]:
    return {"id": f"python:{name}", "content": text.strip(), "metadata": {"title": name, "kind": "python"}}


def conversation() -> Iterator[dict[str, Any]]:
    """Things Ada said over a month."""
    for number, (day, speaker, text) in enumerate(CONVERSATION, 1):
        yield {
            "id": f"{speaker.lower()}-{number}",
            "content": text,
            "timestamp": day,
            "metadata": {"speaker": speaker, "kind": "chat"},
        }


def show(question: str, answer: Answer) -> None:
    """Print an answer with its best sources and where the time went."""
    times = answer.timings
    print(f"\nQ: {question}\nA: {answer.text}")
    for source in answer.sources[:3]:
        line = " ".join(source.text.split())
        mark = "*" if source.cited else " "
        print(f"   {mark} {source.score:.2f} {source.id}: {line[:80]}{'…' if len(line) > 80 else ''}")
    print(f"   route {times.route_s:.2f} s, read {times.prefill_s:.2f} s, write {times.decode_s:.2f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reopen"]:
        reopen(Path(sys.argv[2]))
    else:
        main()
