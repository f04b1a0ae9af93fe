"""A process of its own for the tests: uses a bank until it is done or killed and reports on stdout.

Usage: python worker.py add|mix|share FOLDER PREFIX AMOUNT [CATALOG_URL]

``add`` and ``mix`` announce every write and report it once it is acknowledged; AMOUNT is how many documents,
0 for no end. ``share`` runs four threads in namespaces of their own for AMOUNT seconds and checks what each
one sees.
"""

import itertools
import random
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import MODEL, make_document, make_states

from msa_memory.persistence import Store

THREADS = 4


def say(*words: object) -> None:
    print(*words, flush=True)


def write(store: Store, work: str, prefix: str, count: int) -> None:
    generator = random.Random(prefix)
    for i in itertools.islice(itertools.count(), count or None):
        id = f"{prefix}-{i}"
        text = f"text of {id} " * generator.choice([1, 20, 400])
        say("add", id, 1, len(text))
        store.add([make_document(store, id, text, parts=generator.randint(1, 4), metadata={"i": i})])
        say("done")
        if work == "mix":
            change(store, generator, prefix, i)


def change(store: Store, generator: random.Random, prefix: str, i: int) -> None:
    id = f"{prefix}-{i}"
    match i % 4:
        case 1:
            text = f"new text of {id} " * generator.choice([1, 20])
            say("replace", id, 2, len(text))
            store.replace(make_document(store, id, text, parts=2, metadata={"i": i}))
            say("done")
        case 2:
            say("forget", id)
            store.forget("default", ids=[id])
            say("done")
        case 3:
            say("update", id, 2, len(store.get("default", id).text))
            store.update_metadata("default", id, {"i": -i})
            say("done")
    if i % 16 == 15:
        say("compact", id)
        store.compact()
        say("done")


def share(store: Store, prefix: str, seconds: float) -> None:
    failures: list[str] = []
    rounds: list[int] = []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        try:
            rounds.append(keep_to_myself(store, f"{prefix}-{number}", end))
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        say(failure)
    say("rounds", *rounds)
    sys.exit(bool(failures))


def keep_to_myself(store: Store, mine: str, end: float) -> int:
    """Write, forget and read in one namespace; what it shows must be this thread's own, all of it."""
    generator, held, done = random.Random(mine), set(), 0
    while time.monotonic() < end:
        id = f"d{done}"
        where = {"of": mine}
        store.add([make_document(store, id, f"{mine} says {id}", parts=2, namespace=mine, metadata=where)])
        held.add(id)
        if len(held) > 5:
            gone = generator.choice(sorted(held))
            store.forget(mine, ids=[gone])
            held.discard(gone)
        shown = store.list(mine, generator.choice([None, where])).items
        assert {document.id for document in shown} == held, (mine, held)
        assert all(document.text == f"{mine} says {document.id}" for document in shown), mine
        found = store.passages(store.visible(mine, generator.choice([None, where])).tolist())
        assert {passage.record.document_id for passage in found.values()} == held
        for number, passage in found.items():
            assert passage.record.namespace == mine
            assert store.states(passage.record)["keys"].data == make_states(number)["keys"].data
        done += 1
    return done


def main(work: str, folder: str, prefix: str, amount: str, catalog_url: str | None = None) -> None:
    with Store.open(Path(folder), catalog_url=catalog_url) as store:
        store.bind_model(**MODEL)
        say("ready")
        if work == "share":
            share(store, prefix, float(amount))
        else:
            write(store, work, prefix, int(amount))


if __name__ == "__main__":
    main(*sys.argv[1:])
