"""A device step captured once as a CUDA graph and replayed, so that its many launches cost one.

On other devices the step simply runs. Knows no layers: whatever it is given must read and write the same
tensors every time and never ask the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msa_memory.errors import EngineError

__all__ = ["Replay"]

WARM_UPS = 2


class Replay:
    """``step(inputs) -> output`` on tensors of one shape.

    Args:
        changed: tensors that the step changes; they are put back after the runs that a capture needs.
        capture: False runs the step anew every time, for comparisons.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], changed: Sequence[Tensor] = (), *, capture: bool = True
    ) -> None:
        self._step, self._changed, self._capture = step, tuple(changed), capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """The step's output; where a graph is replayed, valid until the next call."""
        if not inputs.is_cuda or not self._capture:
            return self._step(inputs)
        graph = self._graph or self._record(inputs)
        assert self._inputs is not None
        assert self._output is not None
        if inputs.shape != self._inputs.shape:
            raise EngineError(
                f"a step captured for {tuple(self._inputs.shape)} got {tuple(inputs.shape)}: make another"
            )
        self._inputs.copy_(inputs)
        graph.replay()
        return self._output

    def _record(self, inputs: Tensor) -> torch.cuda.CUDAGraph:
        kept = [tensor.clone() for tensor in self._changed]

        def put_back() -> None:
            for tensor, before in zip(self._changed, kept, strict=True):
                tensor.copy_(before)

        self._inputs = inputs.clone()
        side, main = torch.cuda.Stream(inputs.device), torch.cuda.current_stream(inputs.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):  # kernels are compiled and libraries loaded outside the capture
            for _ in range(WARM_UPS):
                self._step(self._inputs)
                put_back()
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # What other threads allocate meanwhile is none of this capture's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._output = self._step(self._inputs)
        self._graph = graph
        return graph
