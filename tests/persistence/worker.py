"""A process of its own for the tests: writes documents in a loop and reports each acknowledged one on stdout.

Usage: python worker.py FOLDER PREFIX COUNT [add|mix]. With COUNT 0 it runs until it is killed.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import MODEL, make_document

from msa_memory.persistence import Store


def main(folder: str, prefix: str, count: str, work: str = "add") -> None:
    with Store.open(Path(folder)) as store:
        store.bind_model(**MODEL)
        print("ready", flush=True)
        for i in itertools.islice(itertools.count(), int(count) or None):
            id = f"{prefix}-{i}"
            text = f"text of {id} " * 20
            store.add([make_document(store, id, text, parts=3, metadata={"i": i})])
            print(f"added {id}", flush=True)
            if work == "mix" and i % 3 == 1:
                print(f"replacing {id}", flush=True)
                store.replace(make_document(store, id, f"new {text}", parts=2))
                print(f"replaced {id}", flush=True)
            if work == "mix" and i % 3 == 2:
                print(f"forgetting {id}", flush=True)
                store.forget("default", ids=[id])
                print(f"forgotten {id}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
