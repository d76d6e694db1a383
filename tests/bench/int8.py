"""`python -m tests.bench.int8 --llama-venv DIR --gguf FILE`: one stream with int8 weights against llama.cpp, in process.

`pip install llama-cpp-python` into a virtual environment of its own; the GGUF is the file our own weights were read from.
Both sides decode the same number of tokens after the same prompt, greedily, in turn; the first tokens do not count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.sequence import Sampling, Sequence
from gpu_daemon.engine.step_scheduler import StepScheduler
from gpu_daemon.runners.torch_runner import RunnerOptions, TorchRunner

PROMPT = "Tell me a long story about a river, a stone and a quiet market in the valley."
TOKENS = 128
_LLAMA = """
import sys, time
from llama_cpp import Llama
model = Llama(model_path=sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), verbose=False)
prompt, wanted = model.tokenize(sys.argv[3].encode()), int(sys.argv[4])
for _ in range(2):
    model.reset()
    stream = model.generate(prompt, temp=0.0, top_k=1)
    next(stream)
    started = time.perf_counter()
    for _ in range(wanted):
        next(stream)
    speed = wanted / (time.perf_counter() - started)
print(speed)
"""


def ours(folder: Path, threads: int, *, int8: bool) -> float:
    """Tokens a second after the first, by the daemon's own scheduler and runner."""
    runner = TorchRunner.load(folder, RunnerOptions("cpu", 2048, kv_bytes=2**30, threads=threads, int8=int8), lambda *_: None)
    prompt = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    for _ in range(2):
        scheduler = StepScheduler(KvCache(runner.blocks, runner.block_tokens), 512, 1)
        sampling = Sampling(max_tokens=TOKENS + 1, seed=0, temperature=0, ignore_eos=True)
        sequence = Sequence(0, "r", 1, 0, list(prompt), len(prompt), sampling)
        scheduler.waiting.append(sequence)
        started = 0.0
        while sequence.index <= TOKENS:
            (chunk,) = scheduler.plan()
            (sampled,) = runner.run([chunk])
            scheduler.advance(chunk)
            sequence.tokens.append(sampled.token_id)
            started = started or time.perf_counter()
        speed = TOKENS / (time.perf_counter() - started)
    runner.close()
    return speed


def llama(python: Path, gguf: Path, threads: int) -> float:
    command = [str(python), "-c", _LLAMA, str(gguf), str(threads), PROMPT, str(TOKENS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.int8", description=__doc__)
    parser.add_argument("--llama-venv", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--model-dir", type=Path, default=Path("var/models/smollm2-135m"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sides: dict[str, list[float]] = {"int8": [], "stored weights": [], "llama.cpp": []}
    for _ in range(args.rounds):
        sides["int8"].append(ours(args.model_dir, args.threads, int8=True))
        sides["stored weights"].append(ours(args.model_dir, args.threads, int8=False))
        sides["llama.cpp"].append(llama(args.llama_venv / "bin" / "python", args.gguf, args.threads))
    medians = {name: statistics.median(speeds) for name, speeds in sides.items()}
    for name, speed in medians.items():
        sys.stdout.write(f"{name}: {speed:.1f} tokens/s, {speed / medians['llama.cpp']:.2f} of llama.cpp\n")


if __name__ == "__main__":
    main()
