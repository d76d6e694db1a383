"""What a submit needs before an engine can have it, done beside the event loop and the engines: grammars and pictures."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor

from gpu_daemon import wire
from gpu_daemon.engine.sequence import Sequence
from gpu_daemon.errors import InvalidCommand, InvalidGrammar, ModelNotReady
from gpu_daemon.residents import Resident
from protos import inference_pb2 as pb

THREADS = 2  # which also bounds the pictures that are decoded at once
_Key = tuple[int, str, int]  # caller, request, attempt


class Preparing:
    """The submits that are being prepared. Lives on the event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "prepare")
        self._tasks: dict[_Key, asyncio.Task[None]] = {}

    def begin(self, caller: int, submit: pb.Submit, work: Coroutine[None, None, None]) -> None:
        key = (caller, submit.request_id, submit.attempt)
        task = self._tasks[key] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    def abort(self, caller: int, request_id: str, attempt: int) -> None:
        if task := self._tasks.get((caller, request_id, attempt)):
            task.cancel()

    def abort_caller(self, caller: int) -> None:
        for key in [key for key in self._tasks if key[0] == caller]:
            self._tasks[key].cancel()

    async def prepare(self, submit: pb.Submit, resident: Resident, sequences: list[Sequence]) -> None:
        """Gives the sequences their pictures and grammars. Raises InvalidCommand, and ModelNotReady when it left meanwhile."""
        loop = asyncio.get_running_loop()
        eyes = resident.text_runner.eyes
        if submit.pictures:
            if eyes is None:
                raise InvalidCommand(f"{resident.name} does not see")
            bounds = [*submit.picture_pixels, *[0] * len(submit.pictures)]
            jobs = zip(submit.pictures, bounds, strict=False)
            read = [await loop.run_in_executor(self._threads, eyes.read, data, bound) for data, bound in jobs]
            wire.place(sequences, read, eyes.pad_id)
        if submit.sampling.grammar:
            if resident.grammars is None:
                raise InvalidGrammar("the model's folder has no tokenizer")
            generated = [sequence.generated for sequence in sequences]
            compiling = loop.run_in_executor(self._threads, resident.grammars.compile, submit.sampling.grammar, generated)
            for sequence, grammar in zip(sequences, await compiling, strict=True):
                sequence.grammar = grammar
        if resident.engine is None:
            raise ModelNotReady(f"{resident.name} was unloaded")
