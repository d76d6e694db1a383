"""`python -m tests.bench.overhead [--litellm BIN]`: what a gateway adds, over a stub that gives a token every 50 ms.

Ours: gateway, scheduler and metrics before a daemon that computes by arithmetic, against that daemon's own wire. LiteLLM's
proxy: before an endpoint of the same pace, against that endpoint. The same streams, the same machine, in turn. Answers are of
different lengths, and each stream's first is left out: what arrives all at once measures a queue, not a gateway.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import ROOT, _free_port, own_stack
from tests.bench.load import Result, Sample, Target, run
from tests.bench.openai_stub import STEP_SECONDS

MODEL = "smollm2-135m"
_LITELLM_ENV = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
_STUB = """
import asyncio, sys
from tests.apps.fleet.fake_daemon import FakeDaemon
async def main():
    daemon = FakeDaemon("stub", models=[{model!r}], token=sys.argv[1], step_seconds={step}, max_running=256)
    await daemon.start()
    print(daemon.port, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@contextmanager
def _process(*command: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


async def _direct(port: int, token: str, streams: int, rounds: int, tokens: int) -> Result:
    """The same closed loop on the daemon's own wire."""
    from apps.fleet.daemon_client import DaemonClient
    from tests.apps.scheduler.factories import make_request

    client = DaemonClient(f"127.0.0.1:{port}", token)
    samples: list[Sample] = []

    async def one(seed: int) -> None:
        request = make_request(model=MODEL, max_tokens=tokens // 3 + seed % (tokens - tokens // 3), seed=seed)
        started, first = time.perf_counter(), 0.0
        async with client.execute() as stream:
            await stream.submit(request, attempt=1, epoch=1, done={0: ([], 0)}, timeout_ms=60_000, cache_salt=b"")
            async for step in stream:
                first = first or time.perf_counter()
                if any(delta.finish_reason for delta in step.deltas):
                    break
        samples.append(Sample(first - started, time.perf_counter() - started, request.sampling.max_tokens))

    async def loop(number: int) -> None:
        for turn in range(rounds):
            await one(number * rounds + turn)

    started = time.perf_counter()
    await asyncio.gather(*map(loop, range(streams)))
    await client.close()
    return Result(streams, samples, time.perf_counter() - started)


def ours(streams: int, rounds: int, tokens: int) -> tuple[Result, Result]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        os.environ |= {"VAR_DIR": f"{folder}/var", "MODELS_DIR": str(ROOT / "var" / "models")}
        with own_stack() as target:
            token = (Path(folder) / "var" / "secrets" / "daemon_token").read_text().strip()
            with _process(sys.executable, "-c", _STUB.format(model=MODEL, step=STEP_SECONDS), token) as stub:
                assert stub.stdout is not None
                port = int(stub.stdout.readline())
                for line in ("remove-worker local-0", "add-host stub --address 127.0.0.1",
                             f"add-worker stub --host stub --port {port} --model {MODEL}"):  # fmt: skip
                    subprocess.run(
                        [sys.executable, "manage.py", "fleet", *line.split()], cwd=ROOT, check=True, capture_output=True
                    )
                time.sleep(6)
                asyncio.run(run(target, concurrency=8, requests=16, max_tokens=8, seed=1))
                direct = asyncio.run(_direct(port, token, streams, rounds, tokens))
                return direct, asyncio.run(
                    run(target, concurrency=streams, requests=streams * rounds, max_tokens=tokens, shortest=tokens // 3)
                )


def litellm(binary: str, streams: int, rounds: int, tokens: int) -> tuple[Result, Result]:
    stub_port, port = _free_port(), _free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        config.write(f"model_list: [{{model_name: stub, litellm_params: {{model: openai/stub, api_key: none, "
                     f"api_base: 'http://127.0.0.1:{stub_port}/v1'}}}}]\n")  # fmt: skip
        config.flush()
        with (
            _process(sys.executable, "-m", "tests.bench.openai_stub", str(stub_port)),
            _process(binary, "--config", config.name, "--port", str(port), **_LITELLM_ENV),
        ):
            _wait(f"http://127.0.0.1:{port}/health/liveliness")
            results = []
            for where in (stub_port, port):
                target = Target(f"http://127.0.0.1:{where}/v1", "stub", "none", {})
                asyncio.run(run(target, concurrency=8, requests=16, max_tokens=8, seed=1))
                results.append(
                    asyncio.run(
                        run(target, concurrency=streams, requests=streams * rounds, max_tokens=tokens, shortest=tokens // 3)
                    )
                )
            return results[0], results[1]


def _wait(url: str) -> None:
    for _ in range(180):
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise SystemExit("LiteLLM's proxy did not start in 180 s")


def steady(result: Result) -> Result:
    return dataclasses.replace(result, samples=result.samples[result.concurrency :])


def token_ms(result: Result, quantile: float) -> float:
    """Of the answers' times a token, in ms."""
    ordered = sorted(sample.time_per_token for sample in result.samples)
    return 1000 * ordered[min(len(ordered) - 1, int(quantile * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overhead", description=__doc__)
    parser.add_argument("--litellm", help="the `litellm` command of an environment of its own")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    shape = (args.streams, args.rounds, args.tokens)
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "inference_site.settings")
    sides = {"ours": lambda: ours(*shape)}
    if args.litellm:
        sides["LiteLLM proxy"] = lambda: litellm(args.litellm, *shape)
    table = Table(
        "", "first token added p50", "p99", "each token added p50", "p99", "tokens/s", title=f"{args.streams} streams"
    )
    for name, side in sides.items():
        direct, through = map(steady, side())
        figures = [through.ttft_ms(q) - direct.ttft_ms(q) for q in (0.5, 0.99)]
        figures += [token_ms(through, q) - token_ms(direct, q) for q in (0.5, 0.99)]
        table.add_row(name, *(f"{figure:.1f} ms" for figure in figures), f"{through.tokens_per_second:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
