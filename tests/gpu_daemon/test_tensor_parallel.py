"""Daemons of two ranks under a real torchrun, on loopback: the tokens of one process, and no rank left waiting."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from safetensors import safe_open

from apps.core.types import FinishReason, InferenceRequest, SamplingParams, WorkerSnapshot
from apps.fleet.daemon_client import DaemonClient, DaemonError
from gpu_daemon.engine.grammar import GrammarCompiler
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.step_scheduler import StepScheduler
from tests.gpu_daemon.conftest import make_runner, make_tiny, make_tokenizer
from tests.gpu_daemon.driver import make_sequence, run_all
from tests.services import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "t" * 32
_SIZES = {
    "vocab_size": 301, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 1024, "initializer_range": 0.1,
}  # fmt: skip
_SMALL_CACHE = 2 * 40 * 6 * 2 * 16 * 2 * 32 * 4  # bytes: 40 blocks, of the heads of both ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A Qwen3 in float32, wide enough that its KV is worth keeping, its vocabulary odd; and heads that two cannot share."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    config = transformers.Qwen3Config(**_SIZES, eos_token_id=0, bos_token_id=1, tie_word_embeddings=False)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "qwen")
    odd = transformers.LlamaConfig(**{**_SIZES, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96})
    transformers.LlamaForCausalLM(odd).save_pretrained(folder / "odd")
    for kind in ("llama", "qwen2_5_vl"):
        make_tiny(folder / kind, kind)
    for name in ("qwen", "llama", "qwen2_5_vl"):
        make_tokenizer(folder / name)
    return folder


@dataclass
class Daemon:
    """A daemon, or a group of `ranks` under torchrun, in processes of their own."""

    models: Path
    folder: Path  # of its log, its meeting place and, in `kv`, of what it leaves
    ranks: int
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)

    def __enter__(self) -> Daemon:
        arguments = ["-m", "gpu_daemon", "--worker-id", "w", "--port", str(self.port), "--models-dir", str(self.models)]
        arguments += ["--max-model-len", "512", "--kv-handover", str(self.folder / "kv"), *self.options]
        # Meeting by a file, torchrun itself listens nowhere.
        meeting = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-conf",
            "store_type=file",
            "--rdzv-endpoint",
            str(self.folder / str(self.port)),
        ]
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), "--local-addr", "127.0.0.1", *meeting]
        environment = {**os.environ, "DAEMON_TOKEN": TOKEN, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (self.folder / "log").open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, *(torchrun if self.ranks > 1 else []), *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for process in [*self.processes(), self.process]:
                process.kill()
            self.process.wait(10)

    def processes(self) -> list[psutil.Process]:
        """The ranks, in order; alone, the daemon itself."""
        if self.ranks == 1:
            return [self.process]
        ranks = [child for child in self.process.children() if "gpu_daemon" in child.cmdline()]
        return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))

    def ended(self, seconds: float) -> int:
        """The exit status, once every process has gone."""
        ranks = self.processes()
        status = self.process.wait(seconds)
        assert not psutil.wait_procs(ranks, seconds)[1], "a rank was left"
        return status

    async def client(self) -> DaemonClient:
        client = DaemonClient(f"127.0.0.1:{self.port}", TOKEN)
        deadline = time.monotonic() + 90
        while True:
            try:
                await status_of(client)
            except DaemonError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, "the daemon does not answer"
                await asyncio.sleep(0.2)
            else:
                return client


async def status_of(client: DaemonClient) -> WorkerSnapshot:
    return await anext(aiter(client.watch_status(100)))


async def load(client: DaemonClient, name: str = "qwen", engine: str = "continuous") -> None:
    async for _ in client.load_model(name, 1, engine):
        pass


async def answer(client: DaemonClient, prompts: list[list[int]], *, model: str = "qwen", generated=(), **sampling):
    """Of each prompt the tokens and how many of its own were cached, all asked for at once."""
    params = SamplingParams(**{"max_tokens": 12, "seed": 1, "temperature": 0.0, "ignore_eos": True, **sampling})
    tokens, cached = [[] for _ in prompts], [0] * len(prompts)
    async with client.execute() as stream:
        for i, prompt in enumerate(prompts):
            request = InferenceRequest(str(i), "1", "1", model, (tuple(prompt),), params)
            await stream.submit(request, attempt=1, epoch=1, done={0: (list(generated), 0)}, timeout_ms=0, cache_salt=b"s")
        ends = 0
        async for step in stream:
            for delta in step.deltas:
                assert delta.finish_reason is not FinishReason.FAILED, delta.error
                tokens[int(delta.request_id)] += delta.token_ids
                cached[int(delta.request_id)] += delta.cached_tokens
                ends += delta.finish_reason is not None
            if ends == len(prompts):
                return tokens, cached
    raise AssertionError("the stream ended early")


def random_prompts(count: int, seed: int = 5) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 258) for _ in range(rng.randint(1, 200))] for _ in range(count)]


CHAT = random_prompts(1, seed=9)[0] + [7] * 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("daemon")


@pytest.fixture(scope="module")
def first_turn(models, folder) -> list[int]:
    """What one process answered to CHAT, before it was stopped and left its KV."""

    async def turn(daemon: Daemon) -> list[int]:
        client = await daemon.client()
        await load(client)
        ((tokens,), _) = await answer(client, [CHAT])
        await client.close()
        return tokens

    with Daemon(models, folder, 1) as daemon:
        tokens = asyncio.run(turn(daemon))
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.ended(20) == 0
    return tokens


@pytest.fixture(scope="module")
def group(models, folder, first_turn) -> Iterator[Daemon]:
    """Two ranks, with a cache too small for all that is asked of them; the next daemon after the one of `first_turn`."""
    with Daemon(models, folder, 2, ("--kv-bytes", str(_SMALL_CACHE), "--step-tokens", "64")) as daemon:
        yield daemon


@pytest.fixture
async def client(group):
    client = await group.client()
    await load(client)
    yield client
    await client.close()


@pytest.fixture(scope="module")
def runner(models):
    """One process, to compare with."""
    return make_runner(models / "qwen")


async def test_a_chat_goes_on_where_another_mode_left_it(client, runner, first_turn) -> None:
    longer = [*CHAT, *first_turn, 8, 9, 10]
    assert [first_turn] == run_all(runner, [make_sequence(CHAT, max_tokens=12)])
    (tokens, cached) = await answer(client, [longer])
    assert cached == [(len(CHAT) + 11) // 16 * 16]
    assert tokens == run_all(runner, [make_sequence(longer, max_tokens=12)], cache=KvCache(64, 16))


async def test_two_ranks_draw_the_tokens_of_one_process_alone_mixed_preempted_and_resumed(client, runner) -> None:
    prompts = random_prompts(20)
    plan = StepScheduler(KvCache(40, 16), 64, 32)
    expected = run_all(runner, [make_sequence(prompt, max_tokens=30) for prompt in prompts], scheduler=plan)
    assert plan.preemptions > 0
    together, _ = await answer(client, prompts, max_tokens=30)
    assert together == expected
    for prompt, tokens in list(zip(prompts, expected, strict=True))[:3]:
        assert (await answer(client, [prompt], max_tokens=30))[0] == [tokens]
    ((rest,), _) = await answer(client, prompts[:1], generated=expected[0][:15], max_tokens=30)
    assert rest == expected[0][15:]


async def test_sampling_and_grammars_are_rank_0s_and_draw_the_same(client, runner, models) -> None:
    sampling = {"temperature": 1.0, "seed": 4, "top_p": 0.9}
    drawn, _ = await answer(client, random_prompts(4), **sampling)
    assert drawn == run_all(runner, [make_sequence(p, max_tokens=12, **sampling) for p in random_prompts(4)])
    sequence = make_sequence([5, 6, 7], max_tokens=40)
    compiler = GrammarCompiler(models / "qwen" / "tokenizer.json", runner.vocab_size, runner.eos_ids)
    (sequence.grammar,) = compiler.compile("start: /[abcd]{9}/", [[]])
    written, _ = await answer(client, [[5, 6, 7]], max_tokens=40, grammar="start: /[abcd]{9}/")
    assert written == run_all(runner, [sequence])
    assert len(written[0]) == 9


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
async def test_other_architectures_are_split_beside_it_and_leave_nothing_open(group, client, models, name: str) -> None:
    prompts = [prompt[:90] for prompt in random_prompts(6)]
    for _ in range(2):  # what the first load opens for good it opens once
        await load(client, name)
        tokens, _ = await answer(client, prompts, model=name)
        await client.unload_model(name, 1, 1000)
        opened = [rank.num_fds() for rank in group.processes()]
    assert tokens == run_all(make_runner(models / name), [make_sequence(p, max_tokens=12) for p in prompts])
    for _ in range(3):
        await load(client, name)
        await client.unload_model(name, 1, 1000)
    grown = [rank.num_fds() - before for rank, before in zip(group.processes(), opened, strict=True)]
    assert max(grown) <= 14  # a load has 12, which may be there until the next


async def test_what_a_group_cannot_run_is_refused_and_what_serves_goes_on(client) -> None:
    with pytest.raises(DaemonError, match=r"num_attention_heads \(3\) cannot be divided among 2 ranks"):
        await load(client, "odd")
    with pytest.raises(DaemonError, match="json is missing"):
        await load(client, "absent")
    with pytest.raises(DaemonError, match="static engine"):
        await load(client, "llama", "static")
    assert len((await answer(client, [[5, 6, 7]]))[0][0]) == 12


async def test_a_group_says_what_it_is_and_listens_on_loopback_alone(group, client) -> None:
    status = await status_of(client)
    assert (status.mode, status.device) == ("tensor_parallel", "cpu")
    assert 0 < status.memory_free_bytes < status.memory_total_bytes == psutil.virtual_memory().total
    ranks = group.processes()
    assert [rank.environ()["RANK"] for rank in ranks] == ["0", "1"]
    listening = {c.laddr.ip for p in [group.process, *ranks] for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}


@pytest.mark.parametrize("killed", [0, 1])
async def test_no_rank_outlives_another(models, tmp_path, killed: int) -> None:
    with Daemon(models, tmp_path, 2, ("--preload", "qwen")) as daemon:
        client = await daemon.client()
        await load(client)
        asked = asyncio.create_task(answer(client, [[5, 6, 7]], max_tokens=500))
        async with aclosing(client.watch_status(50)) as told:
            await anext(status async for status in told if status.step >= 20)
        ranks = daemon.processes()
        ranks[killed].kill()
        began = time.monotonic()
        with pytest.raises(DaemonError):
            await asyncio.wait_for(asked, 10)
        assert not psutil.wait_procs(ranks, 10)[1]
        assert time.monotonic() - began < 10
        await client.close()
        assert daemon.process.wait(10) != 0


async def test_a_group_that_is_stopped_leaves_in_good_order_and_its_chats_to_one_process(
    group, client, runner, models, folder
) -> None:
    prompt = random_prompts(1, seed=10)[0] + [9] * 60
    ((tokens,), _) = await answer(client, [prompt])
    await client.close()
    group.processes()[0].send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(group.ended, 20) == 0
    longer = [*prompt, *tokens, 11, 12]
    with Daemon(models, folder, 1) as daemon:
        after = await daemon.client()
        await load(after)
        (second, cached) = await answer(after, [longer])
        await after.close()
    assert cached == [(len(prompt) + 11) // 16 * 16]
    assert second == run_all(runner, [make_sequence(longer, max_tokens=12)], cache=KvCache(64, 16))
    waiting = [safe_open(path, "pt").metadata()["weights"] for path in (folder / "kv").iterdir()]
    assert {weights.split("@")[0] for weights in waiting} <= {"llama", "qwen2_5_vl"}  # for who loads them
