"""A tensor-parallel group: one process a rank, started by torchrun, each with its share of every model's heads.

Rank 0 decides and tells: a message a step, as numbers, never as pickles. All ranks then compute the same step, and add up
what they have after each row of products. A group is as alive as its weakest rank: whoever finds another dead, frozen or out
of step ends its own process, so that nobody waits for what will not come.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import IntEnum
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from gpu_daemon.config import Place
from gpu_daemon.errors import LoadFailed

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_MEETING = timedelta(seconds=45)  # until every rank has come
_STEP = timedelta(seconds=60)  # ranks that live wait this long for one another within a step
_LOAD = timedelta(hours=1)  # the same, while they load
_IDLE = timedelta(days=3650)
_PATIENCE = timedelta(seconds=8)  # without a beat; a rank that died is known at once
_BEAT_SECONDS = 0.25
_FRAME = 2048  # numbers of a message's first part, which is all of it but for long prompts
LOST = 70  # the exit status of a rank whose group is broken
_NOTHING = np.zeros(0, np.int64)


class Verb(IntEnum):
    LOAD = 1
    STEP = 2
    SAVE = 3
    RESTORE = 4
    FORGET = 5
    LEAVE = 6


class Message(NamedTuple):
    """`model` is the number that LOAD gave it; `numbers` are the name's bytes, a flat batch, or a block."""

    verb: Verb
    model: int = 0
    numbers: np.ndarray = _NOTHING


class Alone:
    """A group of one: there is nobody to tell, and nothing to add."""

    rank, size, local_size = 0, 1, 1

    def announce(self, name: str) -> int:
        """Has the other ranks load a model; the number it is called by."""
        return 0

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives, if it goes well on every rank; raises its error here, and LoadFailed on the others."""
        return work()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def add(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """On rank 0 every rank's part, side by side along `dim`; elsewhere the rank's own."""
        return x

    def scatter(self, whole: Tensor | None, part: Tensor, dim: int) -> None:
        """Fills `part` with this rank's part of what rank 0 has."""
        assert whole is not None
        part.copy_(whole)


class Group(Alone):
    """One rank's end of it. Steps and loads may run at the same time, on channels of their own."""

    def __init__(self, place: Place, device: torch.device) -> None:
        """Returns when every rank has come. Raises RuntimeError when one does not."""
        self.rank, self.size, self.local_size = place.rank, place.ranks, place.local_ranks
        self.device = device
        self._first_here = place.local_rank == 0
        self._parent = os.getppid()
        self._lock = threading.Lock()
        self._models = 0
        self._leaving = False
        self.memory = 0, 0  # total and free bytes, of all ranks
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(
            backend, store=_store(place), rank=self.rank, world_size=self.size, timeout=_MEETING, device_id=bound
        )
        self._steps = dist.new_group(backend=backend, timeout=_STEP)
        self._messages, self._loads, self._beats = (
            dist.new_group(backend="gloo", timeout=timeout) for timeout in (_IDLE, _LOAD, _PATIENCE)
        )
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._pulse.start()

    # --- Messages ---

    def announce(self, name: str) -> int:
        with self.turn(Verb.LOAD, self._models + 1, np.frombuffer(name.encode(), np.uint8).astype(np.int64)):
            self._models += 1
            return self._models

    @contextmanager
    def turn(self, verb: Verb, model: int = 0, numbers: np.ndarray = _NOTHING) -> Iterator[None]:
        """Tells the others, for them to do with us what the caller does inside. A failure leaves the ranks out of step."""
        with self._lock:
            try:
                self._tell(Message(verb, model, numbers))
                yield
            except Exception as error:  # noqa: BLE001  Whatever it is, the others are waiting within the step.
                lost(f"{verb.name} failed here ({type(error).__name__}: {error})")

    def _tell(self, message: Message) -> None:
        frame = np.zeros(_FRAME, np.int64)
        head, tail = np.split(message.numbers, [_FRAME - 3])
        frame[:3] = message.verb, message.model, len(message.numbers)
        frame[3 : 3 + len(head)] = head
        for part in (frame, tail):
            if len(part):
                dist.broadcast(torch.from_numpy(part), 0, group=self._messages)

    def hear(self) -> Message:
        """What rank 0 tells next."""
        frame = torch.empty(_FRAME, dtype=torch.int64)
        dist.broadcast(frame, 0, group=self._messages)
        verb, model, length = frame[:3].tolist()
        tail = torch.empty(max(0, length - (_FRAME - 3)), dtype=torch.int64)
        if len(tail):
            dist.broadcast(tail, 0, group=self._messages)
        return Message(Verb(verb), model, torch.cat((frame[3 : 3 + length], tail)).numpy())

    # --- Within a load ---

    def together(self, work: Callable[[], T]) -> T:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  It is raised again below, once the others know.
            failure = error
        everywhere = self.least(failure is None)
        if failure is not None:
            raise failure
        if not everywhere:
            raise LoadFailed("another rank could not load it; its log says why")
        return result  # type: ignore[return-value]

    def least(self, number: int) -> int:
        told = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(told, dist.ReduceOp.MIN, group=self._loads)
        return int(told)

    # --- Within a step ---

    def add(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self._steps)
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x, parts, dst=0, group=self._steps)
        return torch.cat(parts, dim) if parts else x

    def scatter(self, whole: Tensor | None, part: Tensor, dim: int) -> None:
        received = torch.empty_like(part, memory_format=torch.contiguous_format)
        parts = None if whole is None else [p.contiguous() for p in whole.to(part).chunk(self.size, dim)]
        dist.scatter(received, parts, src=0, group=self._steps)
        part.copy_(received)

    # --- Life ---

    def _beat(self) -> None:
        """All ranks add up, again and again, who leaves and what memory there is; until rank 0 leaves, or one is missing."""
        while True:
            told = torch.tensor([self._leaving, *self._own_memory()], dtype=torch.int64)
            try:
                dist.all_reduce(told, group=self._beats)
            except RuntimeError as error:
                lost(f"a rank is gone ({error})")
            leaving, *memory = told.tolist()
            self.memory = memory[0], memory[1]
            if leaving:
                return
            if os.getppid() != self._parent:
                lost("torchrun is gone")
            time.sleep(_BEAT_SECONDS)

    def _own_memory(self) -> tuple[int, int]:
        """(total, free): of the rank's GPU; on CPUs the first rank of a host speaks for it."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return total, free
        memory = psutil.virtual_memory()
        return (memory.total, memory.available) if self._first_here else (0, 0)

    def leave(self) -> None:
        """Ends the group in good order: rank 0 tells the others, who come here too."""
        if self.rank == 0:
            self._leaving = True
            with self.turn(Verb.LEAVE):
                pass
        self._pulse.join()
        self.least(0)  # everyone has heard
        dist.destroy_process_group()


def lost(why: str) -> NoReturn:
    """Ends this process at once. Its callers see their streams break, and take their requests elsewhere."""
    _LOG.critical("leaving a broken group: %s", why)
    logging.shutdown()
    os._exit(LOST)


def join(place: Place, device: str) -> Group:
    """Meets the other ranks. Raises LoadFailed for a device that ranks cannot have, RuntimeError when one does not come."""
    found = torch.device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    elif torch.cuda.is_available():
        raise LoadFailed("a group runs on this host's GPUs; hide them (CUDA_VISIBLE_DEVICES=) to have it run on its CPUs")
    if place.local_ranks == place.ranks:  # one host: nothing is to listen where others could reach it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return Group(place, found)


def _store(place: Place) -> Any:
    """Where the ranks meet: torchrun's, or rank 0's own, which listens on that one address."""
    serves = place.rank == 0 and not place.hosted
    listener = socket.create_server(place.store).detach() if serves else None
    return dist.TCPStore(  # type: ignore[attr-defined]
        *place.store, place.ranks, serves, timeout=_MEETING, master_listen_fd=listener, wait_for_workers=False
    )
