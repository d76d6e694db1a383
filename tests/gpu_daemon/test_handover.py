"""KV from one daemon's host memory to the next one's, through files that anyone may have damaged."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gpu_daemon.config import from_arguments
from gpu_daemon.engine.kv_cache import KvCache
from gpu_daemon.engine.kv_store import BlockCosts, HostMemory, KvStore
from gpu_daemon.runners.cache_shapes import PanelLayout, RowLayout
from gpu_daemon.runners.handover import Block, Handover
from gpu_daemon.runners.torch_runner import TorchRunner
from gpu_daemon.sessions import Sessions
from tests.gpu_daemon.conftest import make_runner
from tests.gpu_daemon.driver import make_sequence, run_all

SECRET = "s" * 32
SHAPE = (3, 2, 16, 2, 32)
WEIGHTS = "tiny@17"


def blocks(count: int = 3) -> list[Block]:
    generator = torch.Generator().manual_seed(1)
    return [Block(bytes([i]) * 16, i, torch.randn(SHAPE, generator=generator)) for i in range(count)]


def taken(folder: Path, weights: str = WEIGHTS, shape=SHAPE, secret: str = SECRET) -> list[Block]:
    return list(Handover(folder, secret).take(weights, shape))


def left(folder: Path) -> Path:
    """The one file that a daemon left."""
    assert Handover(folder, SECRET).write(WEIGHTS, blocks(), time.monotonic() + 10) == 3
    (path,) = folder.iterdir()
    return path


def test_blocks_arrive_as_they_were_and_their_files_go(tmp_path) -> None:
    assert left(tmp_path).stat().st_mode & 0o777 == 0o600
    arrived = taken(tmp_path)
    assert [(block.key, block.depth) for block in arrived] == [(block.key, block.depth) for block in blocks()]
    assert all(torch.equal(a.kv, b.kv) for a, b in zip(arrived, blocks(), strict=True))
    assert not list(tmp_path.iterdir())


def test_panels_of_a_cpu_become_rows_of_another_type(tmp_path) -> None:
    panels, rows = PanelLayout(3, 2, 32), RowLayout(torch.bfloat16)
    kept = [block._replace(kv=panels.unpack(panels.pack(block.kv))) for block in blocks()]
    Handover(tmp_path, SECRET).write(WEIGHTS, kept, time.monotonic() + 10)
    assert all(torch.equal(rows.pack(a.kv), b.kv.bfloat16()) for a, b in zip(taken(tmp_path), blocks(), strict=True))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": _flip,
    "a lost end": lambda path: os.truncate(path, path.stat().st_size // 2),
    "nothing in it": lambda path: os.truncate(path, 0),
    "no safetensors": lambda path: path.write_bytes(b"\xff" * 4096),
    "no metadata": lambda path: save_file({"kv": torch.zeros(1)}, path),
    "no digest": lambda path: save_file({"keys": torch.zeros(1)}, path, {"weights": WEIGHTS}),
    "a link": lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to(path.with_name("elsewhere"))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_removed_and_never_used(tmp_path, damage: str) -> None:
    path = left(tmp_path)
    DAMAGES[damage](path)
    assert taken(tmp_path) == []
    assert not os.path.lexists(path)


@pytest.mark.parametrize(
    "taker", [{"weights": "tiny@18"}, {"shape": (3, 2, 16, 1, 32)}, {"secret": "x" * 32}], ids=["weights", "shape", "secret"]
)
def test_what_others_left_is_removed_and_never_used(tmp_path, taker: dict) -> None:
    left(tmp_path)
    assert taken(tmp_path, **taker) == []
    assert not list(tmp_path.iterdir())


def test_another_models_files_wait_for_their_taker_but_not_for_ever(tmp_path) -> None:
    path = left(tmp_path)
    assert taken(tmp_path, "other@17") == []
    assert path.exists()
    os.utime(path, (time.time() - 7200,) * 2)
    assert taken(tmp_path, "other@17") == []
    assert not path.exists()


def test_writing_ends_in_time_with_what_is_most_worth(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("gpu_daemon.runners.handover._FILE_BYTES", 1)
    assert Handover(tmp_path, SECRET).write(WEIGHTS, blocks(), time.monotonic()) == 1
    assert [block.depth for block in taken(tmp_path)] == [0]


def test_host_memory_gives_the_most_worth_first_and_adopts_what_it_has_room_for() -> None:
    memory = HostMemory(300)
    for key, worth, depth in ((b"cheap", 1.0, 0), (b"deep", 5.0, 2), (b"dear", 5.0, 0)):
        memory.put((WEIGHTS, key), key, size=100, worth=worth, depth=depth)
    memory.put(("other", b"x"), b"x", size=1, worth=9.0, depth=0)
    assert [key for key, _, _ in memory.take(WEIGHTS)] == [b"dear", b"deep"]  # the cheap one made room
    assert memory.bytes_used == 1
    store = KvStore(memory, WEIGHTS, 100, BlockCosts(1, 2), lambda block: None, lambda block, data: None)
    assert [store.adopt(bytes([depth]), depth, depth) for depth in range(3)] == [True, True, False]
    assert store.restore(bytes([1]), 0)


async def test_a_daemon_that_serves_already_takes_over_what_another_kind_leaves(tiny_folder, tmp_path) -> None:
    prompt = [3 + i % 200 for i in range(70)]
    (first_runner, first, leaving), (runner, cache, staying) = (serving(tiny_folder, tmp_path, c) for c in (True, False))
    ((*tokens,),) = run_all(first_runner, [make_sequence(prompt)], cache=first)
    first.save_all()
    leaving.leave()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(staying.look(), 2)
    assert not list(tmp_path.iterdir())
    longer = [*prompt, *tokens, 5, 6]
    sequence = make_sequence(longer)
    assert run_all(runner, [sequence], cache=cache) == run_all(first_runner, [make_sequence(longer)], cache=KvCache(64, 16))
    assert sequence.cached == (len(longer) - 3) // 16 * 16


def serving(model: Path, folder: Path, compiled: bool) -> tuple[TorchRunner, KvCache, Sessions]:
    """A model that is loaded, and what its daemon has for it."""
    runner, memory = make_runner(model, compiled=compiled), HostMemory(1 << 24)
    store = KvStore(memory, WEIGHTS, runner.block_bytes, BlockCosts(1, 2), runner.save, runner.restore)
    sessions = Sessions(folder, SECRET, memory)
    sessions.welcome(WEIGHTS, runner, store)
    return runner, KvCache(64, 16, store), sessions


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o701])
def test_a_folder_that_others_can_look_into_is_refused(tmp_path, mode: int, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DAEMON_TOKEN", SECRET)
    folder = tmp_path / "kv"
    folder.mkdir()
    folder.chmod(mode)
    arguments = ["--worker-id", "w", "--port", "1", "--models-dir", str(tmp_path), "--kv-handover"]
    if mode == 0o700:
        assert from_arguments([*arguments, str(folder)]).kv_handover == folder
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    with pytest.raises(SystemExit):
        from_arguments([*arguments, str(folder)])
    assert "closed to others" in capsys.readouterr().err
