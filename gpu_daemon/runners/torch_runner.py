"""Loads a model's folder and runs the engine's chunks on it. Model files are untrusted: safetensors only, no code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

from gpu_daemon.engine.sequence import Chunk, Sampled, Sampling, Sequence
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.llama import LlamaForward, batch
from gpu_daemon.runners.sampler import sample

ARCHITECTURES = {"LlamaForCausalLM": transformers.LlamaForCausalLM, "Qwen3ForCausalLM": transformers.Qwen3ForCausalLM}
Report = Callable[[str, float], None]
_WARM_TOKENS = 64
transformers.logging.disable_progress_bar()


class TorchRunner:
    """One model on one device."""

    def __init__(
        self, folder: Path, *, device: str, max_sequences: int, max_model_len: int, kv_bytes: int, report: Report
    ) -> None:
        """Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        config = _read_config(folder)
        report("reading", 0.1)
        self.device = torch.device(device)
        model = _load(folder, config, self.device)
        self.max_model_len = min(max_model_len, int(config["max_position_embeddings"]))
        self.vocab_size = int(config["vocab_size"])
        self.eos_ids = _eos_ids(folder, config)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        report("building", 0.7)
        self.max_sequences = max_sequences
        if self.device.type == "cuda":
            self.max_sequences = _fitting_sequences(model.config, max_sequences, self.max_model_len, kv_bytes)
        self._forward = LlamaForward(model, self.max_sequences, self.max_model_len)
        self.kv_tokens = self._kv_tokens(kv_bytes)
        self.prefill_ms_per_token = self.decode_ms_per_token = 0.0
        report("warming", 0.9)

    def _kv_tokens(self, kv_bytes: int) -> int:
        """How many tokens may be in flight: by the cap, or by half of the memory that is free now."""
        forward = self._forward
        per_token = 2 * len(forward.layers) * forward.kv_heads * forward.head_dim * forward.dtype.itemsize
        whole: int = self.max_sequences * self.max_model_len
        if self.device.type == "cuda":
            return whole
        return max(self.max_model_len, min(whole, int(kv_bytes or psutil.virtual_memory().available // 2) // int(per_token)))

    def warm(self) -> None:
        """Runs the shapes that requests bring, so the first one does not wait for them, and measures what tokens cost."""
        prompt = Sequence(
            0, "warm", 0, 0, [1] * _WARM_TOKENS, _WARM_TOKENS, Sampling(max_tokens=8, seed=0, temperature=0), slot=0
        )
        self.run([Chunk(prompt, 0, _WARM_TOKENS)])
        self.prefill_ms_per_token = self._time(Chunk(prompt, 0, _WARM_TOKENS)) / _WARM_TOKENS
        self.run([Chunk(prompt, _WARM_TOKENS - 1, 1)])
        self.decode_ms_per_token = self._time(Chunk(prompt, _WARM_TOKENS - 1, 1))

    def _time(self, chunk: Chunk) -> float:
        started = time.perf_counter()
        self.run([chunk])
        return (time.perf_counter() - started) * 1000

    def run(self, chunks: Many[Chunk]) -> list[Sampled]:
        """One step. The result has one entry for each chunk that samples, in the chunks' order."""
        prepared, owners = batch(chunks, self.device)
        logits = self._forward(prepared)
        if not owners:
            return []
        drawn = sample(logits, [chunks[i].sequence for i in owners])
        by_chunk = dict(zip(owners, drawn, strict=True))
        return [by_chunk[i] for i, chunk in enumerate(chunks) if chunk.samples]


def pick_device(wanted: str) -> str:
    """`auto` is the first GPU, or the CPU."""
    if wanted != "auto":
        return wanted
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def device_memory(device: str) -> tuple[str, int, int]:
    """(name, total bytes, free bytes)."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return torch.cuda.get_device_name(device), total, free
    memory = psutil.virtual_memory()
    return "cpu", memory.total, memory.available


def set_threads(count: int) -> None:
    """Threads of one operation. More than there are physical cores only fight each other."""
    torch.set_num_threads(count or psutil.cpu_count(logical=False) or 1)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise LoadFailed(f"{folder.name}: config.json is missing or damaged") from None
    if architecture not in ARCHITECTURES:
        raise LoadFailed(f"{folder.name}: the architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
    return config


def _load(folder: Path, config: dict[str, Any], device: torch.device) -> transformers.PreTrainedModel:
    """The weights, at a precision the device is fast in: bf16 on a GPU, float32 on a CPU."""
    architecture: Any = ARCHITECTURES[config["architectures"][0]]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = architecture.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoadFailed(f"{folder.name}: the weights cannot be read ({type(error).__name__})") from None
    return model.to(device).eval().requires_grad_(False)


def _eos_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end an answer, of both config files."""
    ids: set[int] = set()
    generation = folder / "generation_config.json"
    for source in (config, json.loads(generation.read_text()) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _fitting_sequences(config: Any, wanted: int, length: int, kv_bytes: int) -> int:
    """How many whole sequences the GPU has room for: its cache is real memory from the start."""
    heads = config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_sequence = 2 * config.num_hidden_layers * heads * dim * 2 * length
    room = kv_bytes or torch.cuda.mem_get_info()[0] * 8 // 10
    if room < per_sequence:
        raise LoadFailed("the GPU has no room for the KV cache of one sequence; lower --max-model-len")
    return min(wanted, int(room // per_sequence))
