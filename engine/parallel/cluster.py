"""Ranks that hold one memory together: who is there, and how the leader asks all of them at once.

Rank 0 leads: it runs the question, and every exchange starts there. The other ranks serve requests until
it leaves. An exchange is one request to all, carried out by all at the same time, and one reply of each.
Knows bytes and processes; what a request means is the shard's business.

Three groups of the same ranks: ``control`` (Gloo, without a timeout, for a memory may be idle for days)
wakes the ranks; ``host`` (Gloo) and ``data`` (NCCL on GPUs, else ``host``) carry the rest, with a timeout.
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # while there is no group: its functions' defaults would hold it
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from msa_memory.engine.parallel.wire import as_bytes
from msa_memory.errors import ConfigError, EngineError, RankLostError

__all__ = ["Cluster", "Serve", "join", "joined"]

LEADER = 0
PACKET_BYTES = 1 << 16
"""Of the broadcast that wakes the ranks; what fits needs no second one."""
IDLE = timedelta(days=3650)
PULSE_S = 0.25
"""How often a rank says that it is alive; BEATS_MISSED in a row name it as the lost one."""
BEATS_MISSED = 4
_WORD = 8
Group = dist.ProcessGroup | None
"""None once the cluster was left."""
Request = Mapping[str, Any]
Serve = Callable[[Request, Tensor | None], Tensor]
"""(request, its payload) -> reply bytes, uint8 ``[n]``; run on every rank."""


class Cluster:
    """This process's place among the ranks. Use it as a context: at its end the leader dismisses the others.

    Requests may come from several threads; they take turns.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        self.exchanges = 0
        """Requests so far."""
        self.dropped: deque[tuple[int, int | None]] = deque()
        """(bank, view) nobody looks at any more, told with the next request; view None is a whole bank."""
        self._serve: Serve | None = None
        self._lost: str | None = None
        self._lock = threading.RLock()
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        self._host: Group = dist.group.WORLD
        self._control: Group = dist.new_group(backend="gloo", timeout=IDLE)
        on_gpus = device.type == "cuda"
        self._data: Group = dist.new_group(backend="nccl", timeout=limit) if on_gpus else self._host
        self._pulse = _Pulse(PrefixStore("pulse", store), rank, size)

    @property
    def leads(self) -> bool:
        return self.rank == LEADER

    def owner(self, number: int) -> int:
        """The rank that holds a passage: known to everybody without a table."""
        return number % self.size

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Dismiss the other ranks, if this one leads and none was lost, and leave the group."""
        global _joined
        with self._lock:
            if _joined is not self:
                return
            _joined = None
            if self.leads and self._lost is None and self._serve is not None:
                self._send({"op": "leave"}, None)
            self._pulse.stop()
            if self._lost is None:
                dist.destroy_process_group()
                # A group ends its threads with its last reference. Held until the interpreter goes, one of
                # them may still have to drop a tensor, which aborts the process. Frames of errors that were
                # raised hold references too.
                self._host = self._control = self._data = None
                gc.collect()

    @property
    def attached(self) -> bool:
        return self._serve is not None

    def attach(self, serve: Serve) -> None:
        """What this rank does with requests."""
        self._serve = serve

    def serve(self, serve: Serve) -> None:
        """Carry out the leader's requests until it leaves.

        Raises:
            RankLostError: the leader is gone or does not take the replies.
        """
        self.attach(serve)
        try:
            while (received := self._receive())[0]["op"] != "leave":
                request, payload = received
                self._reply(request, self._carried_out(request, payload))
        except (RuntimeError, ValueError) as error:
            raise self._loss("serving", error) from error

    def ask(
        self,
        request: Request,
        payload: Tensor | None = None,
        *,
        parts: Mapping[int, Tensor] | None = None,
        room: int | None = None,
    ) -> list[Tensor]:
        """One exchange: every rank's reply, in rank order. Leader only.

        Args:
            payload: goes to all ranks.
            parts: bytes for single ranks, each sent to that one alone as its payload.
            room: bytes that hold any reply; None lets the ranks say first how much they have.

        Raises:
            EngineError: a rank could not carry the request out (the others did), or this one does not lead.
            RankLostError: a rank died or did not answer in time, now or in an earlier exchange.
        """
        if not self.leads:
            raise EngineError(f"rank {self.rank} does not lead; open memories on rank {LEADER}, serve here")
        with self._lock:
            if self._lost is not None:
                raise RankLostError(self._lost)
            self.exchanges += 1
            dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
            told = {**request, "room": room, "parts": _sizes(parts, self.size), "dropped": dropped}
            try:
                self._send(told, payload)
                for rank, part in (parts or {}).items():
                    if rank != LEADER:
                        dist.send(part, rank, group=self._host)
                own = (parts or {}).get(LEADER) if parts is not None else payload
                replies = self._gather(told, self._carried_out(told, own))
            except (RuntimeError, ValueError) as error:
                raise self._loss(str(request["op"]), error) from error
        return [_content(reply, rank) for rank, reply in enumerate(replies or [])]

    # messages

    def _send(self, request: Request, payload: Tensor | None) -> None:
        if payload is not None:
            request = {**request, "payload": [str(payload.dtype).removeprefix("torch."), list(payload.shape)]}
        words = torch.frombuffer(bytearray(json.dumps(request).encode()), dtype=torch.uint8)
        packet = torch.zeros(PACKET_BYTES, dtype=torch.uint8)
        packet[:_WORD] = torch.tensor([len(words)]).view(torch.uint8)
        first = words[: PACKET_BYTES - _WORD]
        packet[_WORD : _WORD + len(first)] = first
        room = PACKET_BYTES - _WORD - len(words)
        fused = payload is not None and self._fuses(payload.nbytes, room)
        if fused:
            assert payload is not None
            data = as_bytes(payload)
            packet[_WORD + len(words) : _WORD + len(words) + len(data)] = data
        dist.broadcast(packet, LEADER, group=self._control)
        if len(words) > len(first):
            dist.broadcast(words[len(first) :].clone(), LEADER, group=self._host)
        if payload is not None and not fused:
            dist.broadcast(payload.to(self._data_device()).contiguous(), LEADER, group=self._data)

    def _receive(self) -> tuple[dict[str, Any], Tensor | None]:
        packet = torch.zeros(PACKET_BYTES, dtype=torch.uint8)
        dist.broadcast(packet, LEADER, group=self._control)
        length = int(packet[:_WORD].clone().view(torch.int64))
        words = packet[_WORD : _WORD + length]
        if length > len(words):
            rest = torch.empty(length - len(words), dtype=torch.uint8)
            dist.broadcast(rest, LEADER, group=self._host)
            words = torch.cat((words, rest))
        request: dict[str, Any] = json.loads(words.numpy().tobytes())
        return request, self._payload(request, packet[_WORD + length :])

    def _payload(self, request: Request, behind: Tensor) -> Tensor | None:
        if (parts := request.get("parts")) is not None:
            part = torch.empty(parts[self.rank], dtype=torch.uint8)
            if parts[self.rank]:
                dist.recv(part, LEADER, group=self._host)
            return part
        if "payload" not in request:
            return None
        name, shape = request["payload"]
        payload = torch.empty(shape, dtype=getattr(torch, name), device=self._data_device())
        if self._fuses(payload.nbytes, len(behind)):
            payload.copy_(behind[: payload.nbytes].clone().view(payload.dtype).view(shape))
        else:
            dist.broadcast(payload, LEADER, group=self._data)
        return payload

    def _fuses(self, size: int, room: int) -> bool:
        return size <= room and self._data is self._host

    def _carried_out(self, request: Request, payload: Tensor | None) -> Tensor:
        """The reply, framed by its length; a failure is a reply too, of negative length."""
        if self._serve is None:
            return _framed(b"this rank serves nothing yet: attach a shard first", failed=True)
        try:
            return _framed(self._serve(request, payload), failed=False)
        except Exception as error:  # the leader raises it: the ranks stay in step
            return _framed(f"{type(error).__name__}: {error}".encode(), failed=True)

    def _reply(self, request: Request, reply: Tensor) -> None:
        self._gather(request, reply)

    def _gather(self, request: Request, reply: Tensor) -> list[Tensor] | None:
        """Replies of all ranks on the leader, None elsewhere."""
        room, group, device = request["room"], self._data, self._data_device()
        if room is None or group is not self._host:
            # Before NCCL too: it would wait for a rank that died, where Gloo says so.
            sizes = torch.tensor([len(reply)])
            dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self._host)
        if room is None:
            room, group, device = int(sizes), self._host, torch.device("cpu")
        elif len(reply) > room:
            reply = _framed(f"the reply has {len(reply)} bytes, the room is {room}".encode(), failed=True)
        padded = torch.zeros(max(room, _WORD), dtype=torch.uint8, device=device)
        padded[: len(reply)] = reply[:room]
        gathered = [torch.empty_like(padded) for _ in range(self.size)] if self.leads else None
        dist.gather(padded, gathered, LEADER, group=group)
        return gathered

    def _data_device(self) -> torch.device:
        return torch.device("cpu") if self._data is self._host else self.device

    def _loss(self, doing: str, error: Exception) -> RankLostError:
        """Names the ranks whose pulse stopped. From here on this cluster answers nothing."""
        missing = self._pulse.missing()
        who = f"rank {', '.join(map(str, missing))}" if missing else "a rank"
        self._lost = (
            f"{who} of {self.size} was lost while {doing} (timeout {self.timeout_s:g} s): "
            f"{str(error).splitlines()[0]:.200}. Start all ranks again; what is on disk is not affected"
        )
        return RankLostError(self._lost)


class _Pulse:
    """Every rank counts up in the store, so that whoever stops can be named."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="msa-memory pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def missing(self) -> list[int]:
        """Ranks that do not beat now; empty where the store itself is gone."""
        try:
            before = self._counts()
            time.sleep(BEATS_MISSED * PULSE_S)
            after = self._counts()
        except RuntimeError:
            return []
        return [rank for rank in range(self._size) if before[rank] == after[rank]]

    def _counts(self) -> list[int]:
        return [self._store.add(str(rank), 0) for rank in range(self._size)]

    def _beat(self) -> None:
        while not self._over.wait(PULSE_S):
            try:
                self._store.add(str(self._rank), 1)
            except RuntimeError:  # the process that held the store is gone
                return


_joined: Cluster | None = None


def joined() -> Cluster | None:
    """The cluster this process is part of: like torch.distributed's default group, one per process."""
    return _joined


def join(device: torch.device | str = "cpu", *, timeout_s: float = 300.0) -> Cluster:
    """Meet the other ranks, as torchrun's environment describes them.

    Args:
        device: where this rank keeps routing keys; on a CUDA device exchanges go through NCCL.
        timeout_s: how long a rank may take for one request before it counts as lost.

    Raises:
        ConfigError: this process was not started by torchrun, or joined already.
        RankLostError: not all ranks came in time.
    """
    global _joined
    if _joined is not None or dist.is_initialized():
        raise ConfigError("this process has joined a group of ranks already; leave that one first")
    where = torch.device(device)
    if where == torch.device("cuda"):
        where = torch.device("cuda", torch.cuda.current_device())
    try:
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
        _joined = Cluster(store, rank, size, where, timeout_s)
    except ValueError as error:
        raise ConfigError(
            f"no ranks to join ({error}); start the script with `torchrun --nproc-per-node N SCRIPT`"
        ) from error
    except RuntimeError as error:
        raise RankLostError(
            f"not all ranks met within {timeout_s:g} s: {str(error).splitlines()[0]:.200}"
        ) from error
    return _joined


def _sizes(parts: Mapping[int, Tensor] | None, size: int) -> list[int] | None:
    return None if parts is None else [len(parts[rank]) if rank in parts else 0 for rank in range(size)]


def _framed(reply: Tensor | bytes, *, failed: bool) -> Tensor:
    data = torch.frombuffer(bytearray(reply), dtype=torch.uint8) if isinstance(reply, bytes) else reply
    length = torch.tensor([-len(data) if failed else len(data)])
    return torch.cat((length.view(torch.uint8), data))


def _content(reply: Tensor, rank: int) -> Tensor:
    """What a rank replied, without frame and padding, on the CPU; raises what it reports instead."""
    reply = reply.cpu()
    length = int(reply[:_WORD].clone().view(torch.int64))
    if length < 0:
        words = reply[_WORD : _WORD - length].numpy().tobytes().decode(errors="replace")
        raise EngineError(f"rank {rank} could not carry a request out: {words}")
    return reply[_WORD : _WORD + length]
