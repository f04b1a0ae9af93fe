"""One memory over several processes: each holds the routing keys of a part of the passages.

Run it with `torchrun --nproc-per-node 2 examples/parallel.py FOLDER [MODEL]`; with GPUs give each its own by
`--device cuda`. Nothing else about the memory changes: the same folder may be opened by
one process later on.
"""

from __future__ import annotations

import argparse
import os

from msa_memory import MemoryModel
from msa_memory.engine.parallel import Shard, join

NOTES = {
    "bob": "Bob lives in Oslo and repairs violins.",
    "ada": "Ada moved to Lisbon and is looking for a bakery.",
    "kai": "Kai restores wooden boats in Bergen.",
    "mia": "Mia teaches the cello in Vienna.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    on_gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = "cpu" if options.device == "cpu" else on_gpu
    with join(device) as cluster:
        if not cluster.leads:
            cluster.serve(Shard(cluster))  # until the leader leaves
            return
        with MemoryModel.open(options.folder, model=options.model, device=device) as memory:
            for id, text in NOTES.items():
                memory.add(text, id=id, on_conflict="replace")
            memory.forget("mia")
            for hit in memory.search("Who repairs violins?", k=2):
                print(f"{hit.id}: {hit.text}")
            print(f"{cluster.size} processes, {memory.count()} documents")


if __name__ == "__main__":
    main()
