"""The chosen passages' K/V from a pool into one device buffer, without the host knowing which they are.

The pool may lie in pinned host memory, which a kernel reads over the bus: routing, fetching and attention
then follow each other on the device alone. Shape letters as in ``engine.ops``; B questions, k choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msa_memory.engine.kernels.launching import check_floats, check_together, jit
from msa_memory.errors import EngineError

__all__ = ["gather_chunks", "gather_chunks_reference"]

COLUMNS = 128  # of one program: 256 bytes of bf16 a row, what the bus moves well
ROWS = 16


def gather_chunks_reference(
    keys: Tensor, values: Tensor, places: Tensor, numbers: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in plain torch."""
    shape = (len(numbers), room, *keys.shape[1:])
    found = keys.new_zeros(shape), values.new_zeros(shape)
    counts = torch.zeros(len(numbers), dtype=torch.int32)
    for row, chosen in enumerate(numbers.tolist()):
        held = [places[number].tolist() for number in chosen if 0 <= number < len(places)]
        rows = [first + index for first, count in held for index in range(count)]
        counts[row] = len(rows)
        for pool, out in zip((keys, values), found, strict=True):
            out[row, : len(rows)] = pool[rows]
    return *found, counts


def gather_chunks(
    keys: Tensor, values: Tensor, places: Tensor, numbers: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled chunks of the chosen passages of each question, one passage after another.

    Args:
        keys, values: pools ``[M, G, D]`` of one layer, on the device or in pinned host memory.
        places: int32 ``[N, 2]``: first row and number of chunks of every passage number below N.
        numbers: int64 ``[B, k]`` chosen passage numbers; -1, and others that are not held, take no room.
        room: chunks that any question's choice takes at most.

    Returns:
        Keys and values ``[B, room, G, D]``, zero behind the last chunk, and their counts, int32 ``[B]``.

    Raises:
        EngineError: dtypes, shapes or devices do not fit together.
    """
    check_floats("gather_chunks", keys, values)
    check_together("gather_chunks", places, numbers)
    fits = (
        keys.shape == values.shape
        and keys.is_contiguous()
        and values.is_contiguous()
        and places.dtype == torch.int32
        and numbers.dtype == torch.int64
        and places.shape[1:] == (2,)
    )
    if not fits:
        raise EngineError(
            f"pools {tuple(keys.shape)} and {tuple(values.shape)}, places {places.dtype} "
            f"{tuple(places.shape)} and numbers {numbers.dtype} {tuple(numbers.shape)} do not fit: expected "
            "twice a contiguous [M, G, D], int32 [N, 2] and int64 [B, k]"
        )
    if numbers.is_cuda and not (keys.is_cuda or keys.is_pinned()):
        raise EngineError("the pools are in pageable host memory, which no kernel reads; pin them")
    questions, chosen = numbers.shape
    width = keys.shape[1] * keys.shape[2]
    shape = (questions, room, *keys.shape[1:])
    found = [torch.zeros(shape, dtype=keys.dtype, device=numbers.device) for _ in range(2)]
    counts = torch.zeros(questions, dtype=torch.int32, device=numbers.device)
    if questions and chosen:
        _gather_kernel[(chosen, questions, triton.cdiv(width, COLUMNS))](
            keys, values, places, numbers.contiguous(), *found, counts, chosen, room, width, len(places),
            COLUMNS=COLUMNS, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return found[0], found[1], counts


@jit("chosen", "room", "held")
def _gather_kernel(  # type: ignore[no-untyped-def]
    keys, values, places, numbers, found_keys, found_values, counts, chosen, room, width, held,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS columns of one chosen passage, behind the chunks of those chosen before it."""
    index, question = tl.program_id(0), tl.program_id(1).to(tl.int64)
    before = 0
    for earlier in range(index):
        number = tl.load(numbers + question * chosen + earlier)
        before += tl.load(places + number * 2 + 1, mask=(number >= 0) & (number < held), other=0)
    number = tl.load(numbers + question * chosen + index)
    known = (number >= 0) & (number < held)
    first = tl.load(places + number * 2, mask=known, other=0).to(tl.int64)
    count = tl.load(places + number * 2 + 1, mask=known, other=0)
    count = tl.minimum(count, room - before)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        source = (first + row)[:, None] * width + column[None, :]
        target = (question * room + before + row)[:, None] * width + column[None, :]
        tl.store(found_keys + target, tl.load(keys + source, mask=inside), mask=inside)
        tl.store(found_values + target, tl.load(values + source, mask=inside), mask=inside)
    if (index == chosen - 1) & (tl.program_id(2) == 0):
        tl.store(counts + question, before + count)
