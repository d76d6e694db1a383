"""`python -m tests.gpu_daemon.peak FOLDER...`: the most that loading and the largest step of a model take on this CPU.

In a process of its own, so that nothing which others let go is found and used again. The C library is told to give back what
is large, which it otherwise keeps up to 32 MiB a piece. Of several folders the last counts: those before bring in what every
load needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_daemon.engine.sequence import EngineKind
from gpu_daemon.runners.memory import PeakMeter
from gpu_daemon.runners.opening import loader_of
from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner, set_threads

LENGTH, SAMPLES = 1024, 8  # and as many rows, so that a step sees the largest picture that a sequence may have
OPTIONS = RunnerOptions("cpu", LENGTH, kv_bytes=2**26, threads=1, rows=LENGTH, samples=SAMPLES)
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def measured_peak(*folders: Path) -> int:
    """Bytes."""
    command = [sys.executable, "-m", "tests.gpu_daemon.peak", *map(str, folders)]
    done = subprocess.run(command, env=os.environ | _GIVE_BACK, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _measure(folder: Path) -> int:
    set_threads(1)
    load: Any = loader_of(folder, EngineKind.CONTINUOUS)
    with PeakMeter("cpu") as loading:
        runner = load(folder, OPTIONS, lambda *_: None)
    if isinstance(runner, TorchRunner):
        runner.warm()  # which compiles
    with PeakMeter("cpu") as step:
        runner.stress()
    runner.close()
    del runner
    return max(loading.peak_bytes, loading.held_bytes + step.peak_bytes)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(f"{_measure(Path(argument))}\n")
