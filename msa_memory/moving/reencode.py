"""Moving a bank to another model: every document read again from its kept text, then one switch.

Until the switch the bank works under its old model. What was read is kept, so that an interrupted move goes
on where it stopped. Steps run on the new model's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

from msa_memory.engine.engine import Engine
from msa_memory.moving.encoding import Holding, encode_text
from msa_memory.persistence import Reencoding, Store
from msa_memory.progress import progress_reporter
from msa_memory.types import ReencodeReceipt

__all__ = ["reencode_steps"]

BATCH_DOCUMENTS = 16


def reencode_steps(
    store: Store,
    engine: Engine,
    *,
    model: str,
    passage_tokens: int,
    progress: bool | Callable[[int, int], None] | None,
) -> Generator[None, None, ReencodeReceipt]:
    """Read every document with ``engine`` and make it the bank's model, recorded as ``model``.

    Raises:
        InvalidDocumentError: the new model can read nothing of a document; the bank stays as it was.
    """
    if store.identity.fingerprint == engine.fingerprint:
        return ReencodeReceipt(model=model, fingerprint=engine.fingerprint, documents=0, encoded=0)
    work = Reencoding(store, engine.fingerprint)
    total, encoded = work.start(), 0
    with progress_reporter(progress, total, "Encoding again") as report:
        while True:
            while batch := work.waiting(BATCH_DOCUMENTS):
                done = []
                with Holding(store, fingerprint=engine.fingerprint) as holding:
                    for waiting in batch:
                        passages = yield from encode_text(
                            engine,
                            waiting.document.text,
                            waiting.header,
                            passage_tokens=passage_tokens,
                            reserve=store.reserve_numbers,
                            what=f"document {waiting.document.id!r}",
                            hold=holding.hold,
                        )
                        done.append((waiting, passages))
                    work.put(done)
                encoded += len(done)
                report(max(0, total - work.count_waiting()))
            if work.finish(model, {"name": engine.name}):
                return ReencodeReceipt(
                    model=model, fingerprint=engine.fingerprint, documents=total, encoded=encoded
                )
