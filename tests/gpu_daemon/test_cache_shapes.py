"""The cache shapes of `transformers` 4.x and 5.x, each against a real release of it, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from gpu_daemon.runners.cache_shapes import PanelLayout, RowLayout, fill_cache, from_blocks, from_cache, to_blocks, to_legacy

ROOT = Path(__file__).resolve().parents[2]
KINDS, LAYOUTS = ("Llama", "Qwen3"), ("panels", "rows")
SHAPES = {
    "4.46": {"Llama lists panels", "Llama lists rows", "Llama tuples panels", "Llama tuples rows", "Llama takes tuples"},
    "4.57": {f"{kind} {shape} {layout}" for kind in KINDS for shape in ("layers", "tuples") for layout in LAYOUTS},
    "5.": {f"{kind} layers {layout}" for kind in KINDS for layout in LAYOUTS},
}  # fmt: skip


@pytest.mark.parametrize("release", SHAPES)
def test_answers_change_over_half_way_between_the_library_the_store_and_our_decoders(release: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".venv" / f"transformers-{release}")}  # none for 5: it is installed
    command = [sys.executable, "-m", "tests.gpu_daemon.cache_check"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["release"].startswith(release)
    assert set(report["checked"]) == SHAPES[release]


def _kv(tokens: int) -> torch.Tensor:
    return torch.randn(3, 2, tokens, 2, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", [PanelLayout(3, 2, 32), RowLayout(torch.float32)], ids=["panels", "rows"])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64])
def test_blocks_give_back_what_they_were_given(layout, tokens: int) -> None:
    blocks = to_blocks(_kv(tokens), layout)
    assert len(blocks) == -(-tokens // 16)
    assert torch.equal(from_blocks(blocks, tokens, layout), _kv(tokens))
    for wrong in (0, len(blocks) * 16 + 1):
        with pytest.raises(ValueError, match="do not hold"):
            from_blocks(blocks, wrong, layout)


def test_a_bfloat16_cache_goes_through_float32_blocks_unchanged() -> None:
    kv = _kv(20).bfloat16()
    layout = PanelLayout(3, 2, 32)
    cache = fill_cache(transformers.DynamicCache(), from_blocks(to_blocks(kv, layout), 20, layout), torch.bfloat16)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(from_cache(cache), kv)


def _static() -> transformers.StaticCache:
    config = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, hidden_size=64)
    cache = transformers.StaticCache(config, max_cache_len=8)
    cache.update(*(torch.zeros(1, 2, 3, 32),) * 2, 0)
    return cache


def _uneven() -> transformers.DynamicCache:
    cache = transformers.DynamicCache()
    for layer, tokens in enumerate((3, 2)):
        cache.update(*(torch.zeros(1, 2, tokens, 32),) * 2, layer)
    return cache


@pytest.mark.parametrize(
    ("cache", "complaint"),
    [
        (transformers.DynamicCache(), "empty"),
        ((), "empty"),
        (to_legacy(_kv(4), torch.float32)[:1] * 2 + ((torch.zeros(1, 2, 3, 32),) * 2,), "every token"),
        (((torch.zeros(2, 2, 3, 32),) * 2,), "2 sequences"),
        (_uneven(), "every token"),
        (_static(), "every token"),
        ({"keys": 1}, "dict is no cache shape"),
    ],
    ids=["empty", "no layers", "uneven tuples", "two sequences", "uneven layers", "static", "other"],
)
def test_what_cannot_be_converted_is_refused(cache, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        from_cache(cache)


def test_only_an_empty_cache_is_filled() -> None:
    cache = fill_cache(transformers.DynamicCache(), _kv(2), torch.float32)
    with pytest.raises(ValueError, match="not empty"):
        fill_cache(cache, _kv(2), torch.float32)
