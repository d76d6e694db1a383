"""Loads a model's folder and runs the engine's chunks on it. Model files are untrusted: safetensors only, no code."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers

from gpu_daemon.engine.kv_store import BlockCosts
from gpu_daemon.engine.sequence import Chunk, Sampled, Sampling, Sequence
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.batch import make_batch
from gpu_daemon.runners.sampler import sample
from gpu_daemon.runners.torch_decoder import TorchDecoder
from gpu_daemon.runners.weights import Decoder, take_decoder

if TYPE_CHECKING:
    from gpu_daemon.runners.cpu.decoder import CpuDecoder

ARCHITECTURES = {
    "LlamaForCausalLM": transformers.LlamaForCausalLM,
    "Qwen3ForCausalLM": transformers.Qwen3ForCausalLM,
    "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLForConditionalGeneration,
}
Report = Callable[[str, float], None]
_WARM_TOKENS = 64
_REPEATS = 3
transformers.logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """`kv_bytes` is for the cache, 0 is a share of the free memory; `threads` counts a CPU's, 0 is one a core; `rows` tokens
    and `samples` sequences are a step's largest."""

    device: str
    max_model_len: int
    kv_bytes: int = 0
    threads: int = 0
    int8: bool = False
    rows: int = 512
    samples: int = 32
    compiled: bool = True  # the kernels in runners/cpu; without them torch runs the CPU too


class TorchRunner:
    """One model on one device."""

    def __init__(self, model: transformers.PreTrainedModel, eos_ids: frozenset[int], options: RunnerOptions) -> None:
        """Takes the weights out of `model`, which is of no use afterwards. Raises LoadFailed when the cache has no room."""
        text = model.config.get_text_config()
        self.device = torch.device(options.device)
        self.max_model_len = min(options.max_model_len, int(text.max_position_embeddings))
        self.vocab_size = int(text.vocab_size)
        self.eos_ids = eos_ids
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        decoder = take_decoder(model, self.max_model_len)
        self._sections = len(decoder.sections)
        self._largest = min(options.rows, self.max_model_len), options.samples
        self._layers = len(decoder.layers)
        self.blocks = _blocks(decoder, self._layers, options.kv_bytes, self.max_model_len)
        self._decode = self._make(decoder, options)
        self.block_tokens, self.block_bytes = self._decode.block_tokens, self._decode.block_bytes
        self.prefill_ms_per_token = self.decode_ms_per_token = self.restore_ms = self.forward_ms = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> TorchRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        config = _read_config(folder)
        report("reading", 0.1)
        model = _load(folder, config, torch.device(options.device))
        report("building", 0.5)
        runner = cls(model, _eos_ids(folder, config), options)
        report("warming", 0.9)
        return runner

    def _make(self, decoder: Decoder, options: RunnerOptions) -> CpuDecoder | TorchDecoder:
        if self.device.type == "cpu" and options.compiled:
            from gpu_daemon.runners.cpu.decoder import CpuDecoder  # a GPU's host need not have a compiler

            threads = options.threads or psutil.cpu_count(logical=False) or 1
            return CpuDecoder(decoder, blocks=self.blocks, length=self.max_model_len, threads=threads, int8=options.int8)
        return TorchDecoder(decoder, blocks=self.blocks, length=self.max_model_len)

    def warm(self) -> None:
        """Runs the shapes that requests bring, so the first one does not wait for them, and measures what tokens cost."""
        prompt = Sequence(0, "warm", 0, 0, [1] * _WARM_TOKENS, _WARM_TOKENS, Sampling(max_tokens=8, seed=0, temperature=0))
        prompt.blocks = list(range(-(-_WARM_TOKENS // self.block_tokens)))
        self.prefill_ms_per_token = self._time(lambda: self.run([Chunk(prompt, 0, _WARM_TOKENS)])) / _WARM_TOKENS
        self.decode_ms_per_token = self._time(lambda: self.run([Chunk(prompt, _WARM_TOKENS - 1, 1)]))
        saved = self.save(0)
        self.restore_ms = self._time(lambda: self.restore(0, saved))

    def stress(self) -> None:
        """Runs the largest step there can be, to see what it takes: one long prompt beside as many sequences as may run."""
        rows, samples = self._largest
        blocks = list(range(-(-self.max_model_len // self.block_tokens)))  # shared by all: what they hold is nobody's
        drawn = Sampling(max_tokens=8, seed=0, temperature=1.0, top_p=0.9)
        reach = self.max_model_len if self.device.type == "cuda" else rows  # how far back they look costs a CPU only time
        lengths = [(max(1, rows - samples + 1), 0), *[(reach, reach - 1)] * (min(samples, rows) - 1)]
        chunks = [
            Chunk(Sequence(0, "stress", row, 0, [1] * length, length, drawn, blocks=blocks), start, length - start)
            for row, (length, start) in enumerate(lengths)
        ]
        self.run(chunks)

    def block_costs(self) -> BlockCosts:
        """What `warm` measured: bringing a block back against computing it."""
        return BlockCosts(restore_ms=self.restore_ms, compute_ms=self.prefill_ms_per_token * self.block_tokens)

    def _time(self, work: Callable[[], Any]) -> float:
        """Milliseconds, the median of a few runs after a first."""
        work()
        return statistics.median(self._once(work) for _ in range(_REPEATS))

    def _once(self, work: Callable[[], Any]) -> float:
        started = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - started) * 1000

    @torch.inference_mode()
    def run(self, chunks: Many[Chunk]) -> list[Sampled]:
        """One step. The result has one entry for each chunk that samples, in the chunks' order."""
        batch = make_batch(chunks, self._sections)
        started = time.perf_counter()
        logits = self._decode(batch)
        self.forward_ms = (time.perf_counter() - started) * 1000  # a GPU has only been told by now
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        return sample(logits, sampling) if sampling else []

    def save(self, block: int) -> torch.Tensor:
        """A copy in host memory of one block's keys and values."""
        return self._decode.save(block)

    def restore(self, block: int, saved: torch.Tensor) -> None:
        """Writes a saved block back."""
        self._decode.restore(block, saved)

    @property
    def kv_bytes_held(self) -> int:
        """Of the device's memory: a CPU gives a page of the cache when a token first comes to it."""
        return self.blocks * self.block_bytes if self.device.type == "cuda" else 0

    def sleep(self) -> None:
        """Lets the KV cache go, and keeps the weights in host memory."""
        self._decode.sleep()

    def wake(self, kv_bytes: int) -> None:
        """Back on the device, with a new cache. Raises LoadFailed when that has no room."""
        self.blocks = _blocks(self._decode.decoder, self._layers, kv_bytes, self.max_model_len)
        self._decode.wake(self.blocks)

    def close(self) -> None:
        """Ends the threads it may have."""
        self._decode.close()


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
    """The weights: bfloat16 on a GPU; on a CPU as stored, if that is bfloat16 or float32, else float32."""
    architecture: Any = ARCHITECTURES[config["architectures"][0]]
    stored = str(config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype"))
    dtype = torch.bfloat16 if device.type == "cuda" or stored == "bfloat16" else torch.float32
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


def _blocks(decoder: Decoder, layers: int, kv_bytes: int, length: int) -> int:
    """How many blocks the cache may have: by the cap, or by the memory that is free now. Raises LoadFailed for too few."""
    cuda = decoder.device.type == "cuda"
    itemsize = 2 if cuda else 4
    per_block = 16 * 2 * layers * decoder.kv_heads * decoder.head_dim * itemsize
    free = torch.cuda.mem_get_info()[0] * 8 // 10 if cuda else psutil.virtual_memory().available // 4
    least = -(-length // 16) + 1
    blocks = int((kv_bytes or free) // per_block)
    if blocks < least:
        raise LoadFailed(
            f"the KV cache needs {least * per_block} bytes for one sequence of {length} tokens; "
            "give it more (--kv-bytes) or lower --max-model-len"
        )
    return blocks
