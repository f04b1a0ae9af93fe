"""Settings of a memory and the one place that reads the environment.

``MemoryConfig`` is frozen and keyword-only: every default is visible here and unknown options raise.
Knows no model and no database.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from msa_memory.errors import ConfigError

__all__ = ["MemoryConfig", "cache_folder", "default_memory_folder", "default_model"]


class MemoryConfig(BaseModel):
    """How a memory splits, recalls and answers.

    Sizes named ``*_tokens`` are tokens of the model's own tokenizer; ``*_chars`` are characters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passage_tokens: int = Field(default=512, ge=16, le=8192)
    """Longest passage the model encodes at once; longer documents are split."""
    k: int = Field(default=4, ge=1, le=1000)
    """Documents whose original text is read for an answer."""
    top_k: int | None = Field(default=None, ge=1, le=10_000)
    """Passages attended per router layer; None takes the checkpoint's own number."""
    max_rounds: int = Field(default=2, ge=1, le=16)
    """Rounds of retrieval per question, at most."""
    interleave_reprefill: bool = False
    """Generative evidence: compute every round afresh, as the reference engine does."""
    interleave_bidirectional: bool = False
    """Generative evidence: the reference's quirk of showing the repeated question to itself in full."""
    max_evidence_tokens: int = Field(default=1024, ge=64)
    max_new_tokens: int = Field(default=64, ge=1)
    context: Literal["exact", "grow"] = "exact"
    """How a conversation goes on: ``exact`` reads the turns and this turn's evidence as if for the first time
    and reuses what comes out the same; ``grow`` leaves turns and evidence as they were read and reads only
    what is new, which is faster the longer the conversation and not bit for bit the same."""
    max_recent_tokens: int = Field(default=1024, ge=1, le=16_384)
    """Turns of a session that are read again as they were said, at most; older ones are recalled."""
    min_score: float | None = None
    """Score below which nothing counts as relevant; None takes the model's calibrated value."""
    lexical_weight: float | None = Field(default=None, ge=0)
    """Weight of rare words shared by question and passage beside the routers' score of 1; 0 leaves the
    routers alone, None takes the model's calibrated value."""
    routing: Literal["auto", "exact", "skim"] = "auto"
    """How a question looks for passages on a CPU: ``exact`` scores all of them on every router layer;
    ``skim`` scores all on a few layers, those that come first there on more, and 128 on every layer; ``auto``
    skims memories of about 2 million tokens and more. Scores that are shown are exact in every case."""
    decode_weights: Literal["auto", "exact", "packed"] = "auto"
    """What answers are decoded with on a CPU: ``exact``, the weights documents are read with; ``packed``, the
    same in 4 or 8 bits, about three times as fast; ``auto``, packed where the model's shapes allow it."""
    router_normalize: bool | None = None
    """Force cosine routing on or off; None follows the checkpoint."""
    max_document_chars: int = Field(default=20_000_000, ge=1)
    max_question_tokens: int = Field(default=2048, ge=1)
    max_metadata_bytes: int = Field(default=65_536, ge=0)
    max_metadata_depth: int = Field(default=32, ge=1, le=100)
    """Levels of lists and mappings inside each other."""
    max_batch: int = Field(default=1_000_000, ge=1)
    """Documents of one ``add_many``, questions of one ``query_many`` or ``search_many``."""
    lock_timeout_s: float = Field(default=30.0, ge=0)

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"MemoryConfig option {name!r} is {first.get('input')!r}: {first['msg']}; "
                f"known options are {', '.join(type(self).model_fields)}"
            ) from error


def cache_folder() -> Path:
    """Where models are cached: ``MSA_MEMORY_CACHE`` or the user's cache folder."""
    named = os.environ.get("MSA_MEMORY_CACHE")
    return Path(named).expanduser() if named else user_cache_path("msa-memory")


def default_memory_folder() -> Path:
    """The memory the command line opens when told no other: ``MSA_MEMORY_PATH`` or ``agent-memory`` here."""
    return Path(os.environ.get("MSA_MEMORY_PATH") or "agent-memory").expanduser()


def default_model() -> str | None:
    """The model named by ``MSA_MEMORY_MODEL``, if any."""
    return os.environ.get("MSA_MEMORY_MODEL") or None
