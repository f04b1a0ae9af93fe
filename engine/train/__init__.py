"""Training of memory models: `msa-memory train --help`.

Router training on cached hidden states runs on a CPU in minutes; see ``router``.
"""

__all__: list[str] = []
