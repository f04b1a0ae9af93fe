"""Memory Parallel: one memory over several processes, GPUs or hosts, with torch.distributed.

Every rank holds a shard of the passages; rank 0 runs the questions, and in each router layer one exchange
asks all shards. Start it with torchrun; see ``python -m msa_memory.engine.parallel --help``.
"""

from msa_memory.engine.parallel.bank import ShardedBank, ShardedView, new_bank
from msa_memory.engine.parallel.cluster import Cluster, join, joined
from msa_memory.engine.parallel.memory import ParallelMemory, Read
from msa_memory.engine.parallel.shard import Shard

__all__ = [
    "Cluster",
    "ParallelMemory",
    "Read",
    "Shard",
    "ShardedBank",
    "ShardedView",
    "join",
    "joined",
    "new_bank",
]
