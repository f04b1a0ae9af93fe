"""The engine's lexical scores of training questions and passages, for routers to learn the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from msa_memory.engine.lexical import LexicalIndex, bm25, passage_terms, question_terms

__all__ = ["word_scores"]


def word_scores(
    texts: Sequence[str],
    questions: Sequence[str],
    report: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """BM25 shares 0..1 ``[questions, texts]`` in float16, as a bank of all these texts gives them.

    Args:
        texts: passages with their headers, as they are remembered.
        report: called with the number of questions scored.
    """
    index = LexicalIndex()
    numbers = np.arange(len(texts), dtype=np.int64)
    for number, text in enumerate(texts):
        index.add(number, passage_terms(text))
    lengths, visible = index.lengths(numbers), np.ones(len(texts), dtype=bool)
    found = torch.empty(len(questions), len(texts), dtype=torch.float16)
    for done, question in enumerate(questions):
        terms = question_terms(question)
        scores = bm25(index.postings(terms), terms, numbers, lengths, visible)
        found[done] = torch.from_numpy(scores)
        report(done + 1)
    return found
