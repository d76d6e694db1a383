"""What the daemon knows of one model in memory: its state, its runner, its engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from gpu_daemon.engine.engine import Engine
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.picture import Eyes
from gpu_daemon.engine.sequence import EngineKind, Sequence
from gpu_daemon.engine.static_engine import StaticEngine
from gpu_daemon.engine.task import Task, TaskRunner
from gpu_daemon.engine.task_engine import TaskEngine
from gpu_daemon.errors import InvalidCommand

if TYPE_CHECKING:
    from gpu_daemon.runners.static_runner import StaticRunner
    from gpu_daemon.runners.torch_runner import TorchRunner


@runtime_checkable
class TextRunner(Protocol):
    """What both engines of text ask of their runners, beside running."""

    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    weight_bytes: int
    prefill_ms_per_token: float
    decode_ms_per_token: float

    @property
    def eyes(self) -> Eyes | None:
        """None: the model does not see."""

    def close(self) -> None: ...


AnyRunner: TypeAlias = "TorchRunner | StaticRunner | TaskRunner"
AnyEngine: TypeAlias = Engine | StaticEngine | TaskEngine


@dataclass(slots=True)
class Resident:
    """One model in memory, or on its way there or out. Sizes are in bytes: `kv` is granted, `measured` is its peak."""

    name: str
    kind: EngineKind = EngineKind.CONTINUOUS
    state: str = "loading"  # loading, ready, unloading, failed
    stage: str = "reading"
    progress: float = 0.0
    error: str = ""
    kv_bytes: int = 0
    measured_bytes: int = 0
    runner: AnyRunner | None = None
    engine: AnyEngine | None = None
    grammars: GrammarCompiler | None = None  # None: the model's folder has no tokenizer
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def idle_seconds(self) -> float:
        return time.monotonic() - self.engine.load.used_at if self.engine is not None else 0.0

    @property
    def text_runner(self) -> TextRunner:
        """Raises InvalidCommand for a model that is not one of text."""
        if not isinstance(self.runner, TextRunner):
            raise InvalidCommand(f"{self.name} does not continue text")
        return self.runner

    @property
    def task_runner(self) -> TaskRunner:
        """Raises InvalidCommand for a model of text."""
        if self.runner is None or isinstance(self.runner, TextRunner):
            raise InvalidCommand(f"{self.name} only continues text")
        return self.runner

    def start(self, sequences: list[Sequence]) -> None:
        assert isinstance(self.engine, Engine | StaticEngine)
        self.engine.submit(sequences)

    def start_tasks(self, tasks: list[Task]) -> None:
        assert isinstance(self.engine, TaskEngine)
        self.engine.submit(tasks)

    def stop(self) -> None:
        """Ends its engine, and lets its weights go."""
        if self.engine is not None and self.runner is not None:
            self.engine.stop()
            self.runner.close()
        self.engine = self.runner = self.grammars = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that can be run: what a load brings, and what stays of it in host memory."""

    runner: AnyRunner
    grammars: GrammarCompiler | None
    measured_bytes: int

    def close(self) -> None:
        self.runner.close()
