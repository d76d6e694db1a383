"""A daemon without a model: the real wire, tokens by arithmetic, and faults when a test asks for them.

    async with FakeDaemon("w1", models=["smollm2-135m"]) as daemon:
        client = DaemonClient(daemon.address, daemon.token)

Every step gives each running choice its next token, `token_at(prompt length, seed, choice, index)`, so a request that is
resumed here or elsewhere goes on exactly where it was. Work that is no text is done in `STEPS` equal
steps, the last of which gives `MEDIA`.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc

STEPS = 5
MEDIA = b"made by arithmetic"
VOCABULARY = range(100, 1100)  # no special tokens among them, whatever the tokenizer
Outputs = asyncio.Queue[pb.StepOutput]


def token_at(prompt_length: int, seed: int, choice: int, index: int) -> int:
    """The token that choice `choice` of a request has at `index`."""
    return VOCABULARY[(prompt_length + 31 * seed + 7 * choice + 13 * index) % len(VOCABULARY)]


def tokens(prompt_length: int, seed: int, count: int, choice: int = 0) -> list[int]:
    """The first `count` tokens of a choice."""
    return [token_at(prompt_length, seed, choice, index) for index in range(count)]


@dataclass(eq=False)
class _Sequence:
    outputs: Outputs
    submit: pb.Submit
    choice: pb.Choice
    length: int
    reason: int = pb.FINISH_REASON_UNSPECIFIED

    def advance(self) -> pb.SequenceDelta:
        sampling = self.submit.sampling
        if self.submit.WhichOneof("work"):
            return self._work(sampling.max_tokens)
        token = token_at(len(self.choice.prompt_ids), sampling.seed, self.choice.index, self.length)
        self.length += 1
        if self.length >= sampling.max_tokens:
            self.reason = pb.FINISH_REASON_LENGTH
        return self.delta([token], self.length - 1)

    def _work(self, total: int) -> pb.SequenceDelta:
        index = self.length
        self.length = min(total, index + -(-total // STEPS))
        last = self.length == total
        self.reason = pb.FINISH_REASON_STOP if last else pb.FINISH_REASON_UNSPECIFIED
        delta = self.delta([], index)
        delta.units = self.length - index
        mime = "video/mp4" if self.submit.WhichOneof("work") == "video" else "image/png"
        delta.media, delta.mime = (MEDIA, mime) if last else (b"", "")
        return delta

    def delta(self, ids: Iterable[int], first_index: int) -> pb.SequenceDelta:
        return pb.SequenceDelta(
            request_id=self.submit.request_id,
            attempt=self.submit.attempt,
            choice=self.choice.index,
            first_index=first_index,
            token_ids=ids,
            logprobs=[_logprob(token, self.submit.sampling.top_logprobs) for token in ids] if self._wants_logprobs else [],
            finish_reason=self.reason,
        )

    @property
    def _wants_logprobs(self) -> bool:
        return self.submit.sampling.top_logprobs >= 0


def _logprob(token: int, alternatives: int) -> pb.TokenLogprob:
    top = [pb.TokenAlternative(token_id=token + place, logprob=-0.5 - place) for place in range(alternatives)]
    return pb.TokenLogprob(token_id=token, logprob=-0.5, top=top)


@dataclass
class FakeDaemon(pb_grpc.GpuDaemonServicer):
    """Serves on a free port of loopback between `start` and `stop`, or within `async with`.

    `models` are resident from the start; others can be loaded unless `load_errors` has a reason against it. `folders` are
    what it has on disk, with the bytes that each needs of `budget_bytes`; a load takes `load_seconds`, an unload waits for
    what runs.
    """

    worker_id: str = "w1"
    models: Iterable[str] = ("smollm2-135m",)
    token: str = "t" * 32
    epoch: int = 1
    step_seconds: float = 0.0
    max_running: int = 8
    die_at_step: int = 0  # 0: never
    load_errors: dict[str, str] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    budget_bytes: int = 8 << 30
    load_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.models = list(self.models)
        self.port = 0
        self.step = 0
        self.draining = False
        self.loading: dict[str, float] = {}  # progress
        self.unloading: set[str] = set()
        self.peak_bytes = 0
        self._used = dict.fromkeys(self.models, time.monotonic())
        self.loads: list[str] = []  # every LoadModel asked for
        self.unloads: list[str] = []
        self.engines: dict[str, int] = {}  # of what LoadModel brought
        self.submits: list[pb.Submit] = []
        self.aborts: list[pb.Abort] = []
        self._sequences: list[_Sequence] = []
        self._callers: list[Outputs] = []
        self._work = asyncio.Event()
        self._stepping, self._answering = asyncio.Event(), asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeDaemon:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens, on the port of the time before when there was one."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_GpuDaemonServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(self.address)
        await self._server.start()
        self.thaw()
        self._start(self._steps())

    async def stop(self) -> None:
        """Gone at once: every stream breaks, as when the process is killed. What ran is forgotten."""
        await self._server.stop(grace=None)
        mine = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        self._sequences.clear()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- Faults ---

    def freeze(self) -> None:
        """Stops answering, as under SIGSTOP: connections stay, and nothing comes."""
        self._stepping.clear()
        self._answering.clear()

    def stick(self) -> None:
        """Stops stepping while its status goes on, as a hung kernel would."""
        self._stepping.clear()

    def thaw(self) -> None:
        """Ends `freeze` and `stick`."""
        self._stepping.set()
        self._answering.set()

    def say(self, *deltas: pb.SequenceDelta) -> None:
        """Sends these, true or not, to every open stream."""
        for outputs in self._callers:
            outputs.put_nowait(pb.StepOutput(step=self.step, deltas=deltas))

    # --- Steps ---

    async def _steps(self) -> None:
        while True:
            await self._work.wait()
            await asyncio.sleep(self.step_seconds)
            await self._stepping.wait()
            self._take_step()
            if self.step == self.die_at_step:
                self._start(self.stop())

    def _take_step(self) -> None:
        self.step += 1
        by_caller: defaultdict[Outputs, list[pb.SequenceDelta]] = defaultdict(list)
        for sequence in self._sequences[: self.max_running]:
            by_caller[sequence.outputs].append(sequence.advance())
        for outputs, deltas in by_caller.items():
            outputs.put_nowait(pb.StepOutput(step=self.step, deltas=deltas))
        self._keep([sequence for sequence in self._sequences if not sequence.reason])

    def _keep(self, sequences: list[_Sequence]) -> None:
        self._sequences = sequences
        if not sequences:
            self._work.clear()

    # --- The wire ---

    async def Execute(self, commands: AsyncIterator[pb.Command], context: Any) -> AsyncIterator[pb.StepOutput]:
        await self._authorize(context)
        outputs: Outputs = asyncio.Queue()
        self._callers.append(outputs)
        reader = asyncio.create_task(self._read(commands, outputs))
        try:
            while True:
                yield await outputs.get()
        finally:
            reader.cancel()
            self._callers.remove(outputs)
            self._keep([sequence for sequence in self._sequences if sequence.outputs is not outputs])

    async def _read(self, commands: AsyncIterator[pb.Command], outputs: Outputs) -> None:
        async for command in commands:
            if command.HasField("submit"):
                self.submits.append(command.submit)
                self._submit(command.submit, outputs)
            else:
                self.aborts.append(command.abort)
                self._abort(command.abort, outputs)

    def _submit(self, submit: pb.Submit, outputs: Outputs) -> None:
        sequences = [
            _Sequence(outputs, submit, choice, len(choice.generated_ids) + choice.done_units) for choice in submit.choices
        ]
        if error := self._refusal(submit):
            failed = [pb.SequenceDelta(request_id=submit.request_id, attempt=submit.attempt, choice=s.choice.index,
                                       first_index=s.length, finish_reason=pb.FINISH_REASON_FAILED, error=error)
                      for s in sequences]  # fmt: skip
            outputs.put_nowait(pb.StepOutput(step=self.step, deltas=failed))
            return
        self._sequences += sequences
        self._work.set()

    def _refusal(self, submit: pb.Submit) -> str:
        if submit.epoch != self.epoch:
            return "stale_epoch"
        if self.draining:
            return "draining"
        return "" if submit.model in self.models and submit.model not in self.unloading else "model_not_ready"

    def _abort(self, abort: pb.Abort, outputs: Outputs) -> None:
        ended = [s for s in self._sequences if (s.submit.request_id, s.submit.attempt) == (abort.request_id, abort.attempt)]
        for sequence in ended:
            sequence.reason = pb.FINISH_REASON_CANCELLED
        if ended:
            deltas = [sequence.delta([], sequence.length) for sequence in ended]
            outputs.put_nowait(pb.StepOutput(step=self.step, deltas=deltas))
        self._keep([sequence for sequence in self._sequences if sequence not in ended])

    async def WatchStatus(self, request: pb.WatchStatusRequest, context: Any) -> AsyncIterator[pb.DaemonStatus]:
        await self._authorize(context)
        while True:
            await self._answering.wait()
            yield self.status()
            await asyncio.sleep(request.interval_ms / 1000)

    def status(self) -> pb.DaemonStatus:
        """What it says of itself; a test may replace this to have it lie."""
        return pb.DaemonStatus(
            worker_id=self.worker_id,
            epoch=self.epoch,
            step=self.step,
            device="cpu",
            device_name="arithmetic",
            mode="individual",
            draining=self.draining,
            memory_total_bytes=8 << 30,
            memory_free_bytes=4 << 30,
            models=[*(self._model_status(model) for model in self.models), *map(self._loading_status, self.loading)],
            memory_budget_bytes=self.budget_bytes,
            memory_reserved_bytes=self.reserved_bytes,
            folders=[pb.ModelFolder(model=name, need_bytes=size, weight_bytes=size) for name, size in self.folders.items()],
        )

    @property
    def reserved_bytes(self) -> int:
        return sum(self.folders.get(model, 0) for model in [*self.models, *self.loading])

    def _loading_status(self, model: str) -> pb.ModelStatus:
        return pb.ModelStatus(model=model, state=pb.MODEL_STATE_LOADING, progress=self.loading[model], stage="reading")

    def _model_status(self, model: str) -> pb.ModelStatus:
        mine = sum(sequence.submit.model == model for sequence in self._sequences)
        running = min(mine, self.max_running)
        if mine:
            self._used[model] = time.monotonic()
        return pb.ModelStatus(
            model=model,
            state=pb.MODEL_STATE_UNLOADING if model in self.unloading else pb.MODEL_STATE_READY,
            resident_bytes=self.folders.get(model, 0),
            idle_ms=int((time.monotonic() - self._used.setdefault(model, time.monotonic())) * 1000),
            progress=1.0,
            max_model_len=8192,
            running=running,
            waiting=mine - running,
            max_running=self.max_running,
            kv_blocks_total=1000,
            kv_blocks_free=1000 - running,
            weight_bytes=1 << 20,
            prefill_ms_per_token=0.01,
            decode_ms_per_token=max(0.01, self.step_seconds * 1000),
            engine=self.engines.get(model, pb.ENGINE_KIND_CONTINUOUS),
        )

    async def LoadModel(self, request: pb.LoadModelRequest, context: Any) -> AsyncIterator[pb.LoadProgress]:
        await self._authorize(context)
        self.loads.append(request.model)
        yield pb.LoadProgress(stage="reading", progress=0.5)
        await self._answering.wait()
        if reason := self._obstacle(request.model):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)
        if request.model not in self.models:
            self.loading[request.model] = 0.5
            self.peak_bytes = max(self.peak_bytes, self.reserved_bytes)
            await asyncio.sleep(self.load_seconds)
            del self.loading[request.model]
            self.models = [*self.models, request.model]
            self.engines[request.model] = request.engine
            self._used[request.model] = time.monotonic()
        yield pb.LoadProgress(stage="ready", progress=1.0)

    def _obstacle(self, model: str) -> str:
        if model in self.load_errors:
            return self.load_errors[model]
        fits = model in self.models or self.reserved_bytes + self.folders.get(model, 0) <= self.budget_bytes
        return "" if fits else f"{model} does not fit"

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Any) -> pb.UnloadModelResponse:
        await self._authorize(context)
        self.unloads.append(request.model)
        self.unloading.add(request.model)
        while any(sequence.submit.model == request.model for sequence in self._sequences):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        self.unloading.discard(request.model)
        self.models = [model for model in self.models if model != request.model]
        return pb.UnloadModelResponse()

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        await self._authorize(context)
        self.draining = True
        return pb.DrainResponse(empty=not self._sequences)

    async def _authorize(self, context: Any) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization")
        if given != f"Bearer {self.token}":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "send the daemon's token")
