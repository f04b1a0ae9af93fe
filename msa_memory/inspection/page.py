"""The page's text and its way to disk.

The template and its style sheet lie beside this file. The page holds everything it needs: no script, no other
file. Its content security policy forbids both to whatever might slip through, and allows the one style sheet
by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup
from numpy.typing import NDArray

from msa_memory.errors import ConfigError, StorageError
from msa_memory.inspection.findings import Findings, SeenDocument
from msa_memory.inspection.shown import as_html, as_text
from msa_memory.inspection.watching import Candidate, RoutingPicture, Watched
from msa_memory.persistence.disk import guarded, sync, sync_folder
from msa_memory.types import Source

__all__ = ["render", "write_page"]

GROUP_DOCUMENTS = 100
SHADES = 10
"""Steps of the colour scale; the style sheet has a class for each."""


def render(findings: Findings, *, name: str) -> str:
    """The whole page as HTML; ``name`` is what it calls the memory."""
    style = _part("page.css")
    places = {seen.document.id: place for place, seen in enumerate(findings.documents, 1)}
    watched = findings.asked
    return _template().render(
        name=name,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=version("msa-memory"),
        findings=findings,
        stats=findings.stats,
        where=json.dumps(findings.where, ensure_ascii=False) if findings.where else "",
        groups=list(_groups(findings.documents)),
        places=places,
        watched=watched,
        citations=[] if watched is None else _citations(watched, findings.documents),
        routings=[] if watched is None else [_Routing.of(one, watched) for one in watched.routings],
        quotes=_quotes(watched),
    )


def write_page(path: Path, page: str, *, overwrite: bool = False) -> int:
    """Put the page on disk, whole or not at all, for its owner alone; its bytes.

    Raises:
        StorageError: the file exists and ``overwrite`` is false, or cannot be written.
        ConfigError: its folder does not exist.
    """
    data = page.encode()
    if not path.parent.is_dir():
        raise ConfigError(f"the folder {path.parent} does not exist; make it first")
    with guarded("write the page", path):
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                sync(file.fileno())
            _put(Path(partial), path, overwrite)
        finally:
            Path(partial).unlink(missing_ok=True)
        sync_folder(path.parent)
    return len(data)


def _put(partial: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(partial, path)
        return
    try:
        os.link(partial, path)  # unlike a rename it refuses to replace anything
    except FileExistsError as error:
        raise StorageError(
            f"{path} exists already; name another file, or say overwrite to replace it"
        ) from error


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": as_html, "plain": as_text}
    return environment.from_string(_part("page.html"))


def _part(name: str) -> str:
    return (files("msa_memory.inspection") / name).read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Group:
    """Documents that fold away together; ``first`` is the place of the first of them, from 1."""

    first: int
    documents: Sequence[SeenDocument]


def _groups(documents: Sequence[SeenDocument]) -> Iterator[_Group]:
    for start in range(0, len(documents), GROUP_DOCUMENTS):
        yield _Group(start + 1, documents[start : start + GROUP_DOCUMENTS])


@dataclass(frozen=True, slots=True)
class _Citation:
    """A source of the answer and where on the page its text stands, if it does."""

    number: int
    source: Source
    target: str


def _citations(watched: Watched, documents: Sequence[SeenDocument]) -> list[_Citation]:
    shown = {seen.document.id: (place, len(seen.excerpt.text)) for place, seen in enumerate(documents, 1)}
    citations = []
    for number, source in enumerate(watched.answer.sources, 1):
        place, chars = shown.get(source.id, (0, 0))
        target = f"s{number}" if place and source.end <= chars else f"d{place}" if place else ""
        citations.append(_Citation(number, source, target))
    return citations


def _quotes(watched: Watched | None) -> dict[str, list[tuple[int, int, int]]]:
    """By document: where in its text the answer's sources lie, and their numbers, in reading order."""
    quotes: dict[str, list[tuple[int, int, int]]] = {}
    for number, source in enumerate(() if watched is None else watched.answer.sources, 1):
        quotes.setdefault(source.id, []).append((source.start, source.end, number))
    return {id: sorted(found) for id, found in quotes.items()}


@dataclass(frozen=True, slots=True)
class _Passage:
    """A candidate, ready to be drawn: shades of its chunks per layer ``[L][R]``, and its text by chunk."""

    candidate: Candidate
    shades: list[list[int]]
    pieces: list[tuple[int, float, str]]
    """Shade, mean score over the layers, text."""


@dataclass(frozen=True, slots=True)
class _Routing:
    """A routing, ready to be drawn; ``shades`` ``[L][P]`` of the scores, each layer on its own scale."""

    picture: RoutingPicture
    shades: list[list[int]]
    passages: list[_Passage]

    @classmethod
    def of(cls, picture: RoutingPicture, watched: Watched) -> _Routing:
        candidates = picture.candidates
        if not candidates:
            return cls(picture, [[] for _ in picture.layers], [])
        chunks = np.concatenate([candidate.chunks for candidate in candidates], axis=1)  # [L, all R]
        ends = np.cumsum([candidate.chunks.shape[1] for candidate in candidates])[:-1]
        per_layer = np.split(_shades(chunks), ends, axis=1)
        means = np.split(_shades(chunks.mean(axis=0, keepdims=True))[0], ends)
        scores = np.array([candidate.layers for candidate in candidates], dtype=np.float32).T
        passages = [
            _Passage(candidate, shades.tolist(), _pieces(candidate, mean.tolist()))
            for candidate, shades, mean in zip(candidates, per_layer, means, strict=True)
        ]
        return cls(picture, _shades(scores).tolist(), passages)


def _shades(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Each row's scores as steps from 0 (its lowest) to SHADES (its highest)."""
    low, high = scores.min(axis=1, keepdims=True), scores.max(axis=1, keepdims=True)
    shades: NDArray[np.int64] = np.rint((scores - low) / np.maximum(high - low, 1e-6) * SHADES).astype(
        np.int64
    )
    return shades


def _pieces(candidate: Candidate, shades: Sequence[int]) -> list[tuple[int, float, str]]:
    """The passage's text cut at its chunks; chunks that lie in the header alone have none."""
    ends = [*candidate.starts[1:], len(candidate.text)]
    means = candidate.chunks.mean(axis=0)
    pieces = [
        (shade, float(mean), candidate.text[start:end])
        for shade, mean, start, end in zip(shades, means, candidate.starts, ends, strict=True)
    ]
    return [piece for piece in pieces if piece[2]]
