"""From router scores to evidence: which documents, which of their text, in what order.

Knows passages, scores and token budgets; no tensors beyond score arrays and no SQL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from msa_memory.engine import layout
from msa_memory.engine.lexical import COMMON_WORDS
from msa_memory.persistence import PassageRecord, PassageText
from msa_memory.types import Source

__all__ = [
    "Hit",
    "best_documents",
    "citation",
    "cite",
    "evidence_entry",
    "evidence_text",
    "fit_evidence",
    "to_source",
]

MIN_EXCERPT_TOKENS = 32
LONGEST_WORD = 32
"""Characters: a cut moves at most this far to a word's end, since not all scripts have spaces."""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Hit:
    """A document the routers rank, with its passages best first."""

    document_id: str
    score: float
    passages: tuple[PassageRecord, ...]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A stretch of one passage that will be read."""

    passage: PassageText
    score: float
    start: int
    end: int
    """Characters in the document."""

    @property
    def text(self) -> str:
        return self.passage.document_text[self.start : self.end]


def best_documents(
    numbers: NDArray[np.int64],
    scores: NDArray[np.float32],
    records: Mapping[int, PassageRecord],
    k: int,
    skip: Iterable[str] = (),
) -> list[Hit]:
    """The k distinct documents whose best passage scores highest; fewer if fewer are visible.

    ``scores`` ``[P]`` follow ``numbers`` ``[P]``; masked passages are -inf. Ties go to the older passage.
    """
    order = np.lexsort((numbers, -scores))
    order = order[np.isfinite(scores[order])]
    skipped = set(skip)
    found: dict[str, list[tuple[float, PassageRecord]]] = {}
    for index in order:
        record = records.get(int(numbers[index]))  # none where it was forgotten since the scoring
        if record is None or record.document_id in skipped:
            continue
        if record.document_id not in found and len(found) == k:
            break
        found.setdefault(record.document_id, []).append((float(scores[index]), record))
    return [
        Hit(document, passages[0][0], tuple(record for _, record in passages))
        for document, passages in found.items()
    ]


def fit_evidence(
    hits: Sequence[Hit],
    texts: dict[int, PassageText],
    scores: dict[int, float],
    budget: int,
    cost: Callable[[Excerpt], int],
    best_chunk: Callable[[PassageText], tuple[int, int]],
) -> tuple[list[Excerpt], list[Excerpt]]:
    """What to read of each hit within ``budget`` tokens, and what was dropped, both best first.

    Whole passages while they fit; otherwise documents share the budget and each is cut to its best chunk
    with its neighbours. Documents that would get fewer than 32 tokens are dropped, lowest-ranked first, and
    those of whose text nothing fits.

    Args:
        cost: tokens an excerpt takes as it will be read, its date and title included.
        best_chunk: characters, in the document, of a passage's best-scoring chunk.
    """
    whole = [_whole(texts[hit.passages[0].number], scores) for hit in hits]
    most = max(1, budget // MIN_EXCERPT_TOKENS)
    chosen, dropped, left = [], [], budget
    for excerpt, share in zip(whole[:most], _share(list(map(cost, whole[:most])), budget), strict=True):
        fitted = _shrunk(excerpt, share, cost, best_chunk)
        if fitted is None:
            dropped.append(excerpt)
        else:
            chosen.append(fitted)
            left -= cost(fitted)
    chosen += _more_passages(
        hits[:most], {e.passage.record.number for e in chosen}, texts, scores, left, cost
    )
    return chosen, dropped + whole[most:]


def _more_passages(
    hits: Sequence[Hit],
    read: set[int],
    texts: dict[int, PassageText],
    scores: dict[int, float],
    left: int,
    cost: Callable[[Excerpt], int],
) -> list[Excerpt]:
    """Further passages of documents that are read already, as long as they fit whole."""
    more = []
    for hit in hits:
        for record in hit.passages[1:] if hit.passages[0].number in read else ():
            excerpt = _whole(texts[record.number], scores)
            if (size := cost(excerpt)) <= left:
                left -= size
                more.append(excerpt)
    return more


def evidence_text(excerpts: Sequence[Excerpt]) -> str:
    """The excerpts as the model reads them: dated, oldest first, so that the newest stands last."""
    ordered = list(reversed(excerpts))  # of one time, the best stands last
    ordered.sort(key=lambda excerpt: excerpt.passage.timestamp)
    return "\n".join(map(evidence_entry, ordered))


def evidence_entry(excerpt: Excerpt) -> str:
    """One excerpt as the model reads it, headed by its date, title and speaker."""
    passage = excerpt.passage
    return layout.evidence_entry(passage.header, passage.timestamp.date(), excerpt.text)


def citation(number: int, excerpt: Excerpt) -> str:
    """One excerpt as a line that another language model can cite by number."""
    return f"[{number}] ({excerpt.passage.timestamp.date().isoformat()}) {excerpt.text.strip()}"


def to_source(excerpt: Excerpt, *, cited: bool = False) -> Source:
    """The public form of an excerpt."""
    record = excerpt.passage.record
    return Source(
        id=record.document_id,
        passage=record.number,
        start=excerpt.start,
        end=excerpt.end,
        text=excerpt.text,
        score=excerpt.score,
        metadata=excerpt.passage.metadata,
        timestamp=excerpt.passage.timestamp,
        cited=cited,
    )


def cite(answer: str, question: str, sources: Sequence[Source]) -> tuple[Source, ...]:
    """Mark the sources that carry the answer's own words (those the question did not bring)."""
    wanted = _content_words(answer) - _content_words(question) or _content_words(answer)
    shares = [len(wanted & _content_words(source.text)) / max(1, len(wanted)) for source in sources]
    best = max(shares, default=0.0)
    cited = [share >= 0.5 and share == best for share in shares]
    return tuple(replace_cited(source, flag) for source, flag in zip(sources, cited, strict=True))


def replace_cited(source: Source, cited: bool) -> Source:
    """The same source, marked as cited or not."""
    return source if source.cited == cited else source.model_copy(update={"cited": cited})


def _content_words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in COMMON_WORDS}


def _whole(passage: PassageText, scores: dict[int, float]) -> Excerpt:
    record = passage.record
    return Excerpt(passage, scores[record.number], record.start, record.end)


def _share(sizes: Sequence[int], budget: int) -> list[int]:
    """Split a budget fairly: small ones keep their size, what they leave goes to the large ones."""
    shares, left = [0] * len(sizes), budget
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    for place, index in enumerate(order):
        shares[index] = min(sizes[index], left // (len(order) - place))
        left -= shares[index]
    return shares


def _shrunk(
    excerpt: Excerpt,
    room: int,
    cost: Callable[[Excerpt], int],
    best_chunk: Callable[[PassageText], tuple[int, int]],
) -> Excerpt | None:
    """The excerpt, cut around its best chunk until it costs at most ``room``; None if nothing is left."""
    if (size := cost(excerpt)) <= room:
        return excerpt
    chunk, part, cut = best_chunk(excerpt.passage), 1.0, excerpt
    while size > room:
        part *= min(room / size, 0.9)  # again where the text around the chunk has more tokens than elsewhere
        cut = _around(excerpt, chunk, part)
        if not cut.text.strip():
            return None
        size = cost(cut)
    return cut


def _around(excerpt: Excerpt, chunk: tuple[int, int], part: float) -> Excerpt:
    """Cut an excerpt to ``part`` of its characters around a chunk, at word ends where there are any."""
    room = int((excerpt.end - excerpt.start) * part)
    middle = (chunk[0] + chunk[1]) // 2
    start = max(excerpt.start, min(middle - room // 2, excerpt.end - room))
    end = min(excerpt.end, start + room)
    text = excerpt.passage.document_text
    if start > excerpt.start:
        spaces = (at for at in range(start - 1, min(start + LONGEST_WORD, end)) if text[at].isspace())
        start = next(spaces, start - 1) + 1
    if end < excerpt.end:
        spaces = (at for at in range(end, max(end - LONGEST_WORD, start), -1) if text[at].isspace())
        end = next(spaces, end)
    return replace(excerpt, start=start, end=end)
