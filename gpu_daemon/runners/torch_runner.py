"""Loads a model's folder and runs the engine's chunks on it. Model files are untrusted: safetensors only, no code."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import transformers

from gpu_daemon.config import DaemonConfig
from gpu_daemon.engine.kv_store import BlockCosts
from gpu_daemon.engine.sequence import Chunk, Sampled, Sampling, Sequence
from gpu_daemon.errors import LoadFailed
from gpu_daemon.runners.batch import make_batch
from gpu_daemon.runners.cache_shapes import BLOCK_TOKENS, Layout
from gpu_daemon.runners.leader import LeadDecoder
from gpu_daemon.runners.parallel import Alone, Group
from gpu_daemon.runners.sampler import sample
from gpu_daemon.runners.sharding import end_mesh, split
from gpu_daemon.runners.torch_decoder import TorchDecoder
from gpu_daemon.runners.vision import Vision, read_processor
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
CPU_STRESS_ROWS = 64  # a CPU's activations grow with the rows and nothing else; a full step would take it seconds
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
    group: Alone = field(default_factory=Alone)
    model: int = 0  # what the group calls it


def runner_options(config: DaemonConfig, device: str, group: Alone, model: int, kv_bytes: int = 0) -> RunnerOptions:
    """`kv_bytes` is each rank's. The same on every rank but for that, of which the least counts."""
    return RunnerOptions(
        device=device,
        max_model_len=config.max_model_len,
        kv_bytes=kv_bytes or config.kv_bytes,
        threads=config.threads,
        int8=config.int8,
        rows=config.step_tokens if device.startswith("cuda") else min(CPU_STRESS_ROWS, config.step_tokens),
        samples=config.max_sequences,
        group=group,
        model=model,
    )


class TorchRunner:
    """One model on one device."""

    def __init__(
        self, model: transformers.PreTrainedModel, eos_ids: frozenset[int], options: RunnerOptions, eyes: Vision | None = None
    ) -> None:
        """Takes the weights out of `model`, which is of no use afterwards. Raises LoadFailed when the cache has no room."""
        text = model.config.get_text_config()
        self.device = torch.device(options.device)
        self.max_model_len = min(options.max_model_len, int(text.max_position_embeddings))
        self.vocab_size = int(text.vocab_size)
        self.eos_ids = eos_ids
        self.eyes = eyes
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        group = options.group
        decoder = group.together(lambda: take_decoder(model, self.max_model_len, group.size))
        self._sections = len(decoder.sections)
        self._largest = min(options.rows, self.max_model_len), options.samples
        self.blocks = group.least(_blocks_that_fit(_block_bytes(decoder), options))
        _require_blocks(self.blocks, _block_bytes(decoder), self.max_model_len)
        self.decoder = group.together(lambda: self._make(decoder, options))
        self.block_tokens, self.block_bytes = self.decoder.block_tokens, self.decoder.block_bytes
        self.layout: Layout = self.decoder.layout
        self.kv_shape = _block_shape(decoder, group.size)
        self.prefill_ms_per_token = self.decode_ms_per_token = self.restore_ms = self.forward_ms = 0.0

    @classmethod
    def load(cls, folder: Path, options: RunnerOptions, report: Report) -> TorchRunner:
        """From a model's folder. Raises LoadFailed. `report(stage, progress)` is called as the load goes on."""
        report("reading", 0.1)
        model, eos_ids = options.group.together(lambda: _read(folder, options))
        report("building", 0.5)
        eyes = _eyes(model, folder) if options.group.size == 1 else None  # a group's ranks would all have to see
        runner = cls(model, eos_ids, options, eyes)
        del model
        gc.collect()  # its modules hold one another, and weights and sockets that nobody needs
        report("warming", 0.9)
        return runner

    def _make(self, decoder: Decoder, options: RunnerOptions) -> CpuDecoder | TorchDecoder | LeadDecoder:
        if isinstance(options.group, Group):
            share = TorchDecoder(decoder, blocks=self.blocks, length=self.max_model_len, group=options.group)
            return share if options.group.rank else LeadDecoder(share, options.group, options.model)
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
        if self.eyes is not None:
            self.eyes.warm()
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
        if self.eyes is not None:
            self.eyes.stress(reach)

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
        started = time.perf_counter()
        self._look(chunks)
        logits = self.decoder(make_batch(chunks, self._sections))
        self.forward_ms = (time.perf_counter() - started) * 1000  # a GPU has only been told by now
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        return sample(logits, sampling) if sampling else []

    def _look(self, chunks: Many[Chunk]) -> None:
        """At every picture of the step that was not seen yet; the plan has bounded how many."""
        for picture in (picture for chunk in chunks for picture in chunk.pictures):
            if picture.embedding is None and self.eyes is not None:
                picture.embedding = self.eyes.look(picture)

    def save(self, block: int) -> torch.Tensor:
        """A copy in host memory of one block's keys and values."""
        return self.decoder.save(block)

    def restore(self, block: int, saved: torch.Tensor) -> None:
        """Writes a saved block back."""
        self.decoder.restore(block, saved)

    @property
    def kv_bytes_held(self) -> int:
        """Of the device's memory: a CPU gives a page of the cache when a token first comes to it."""
        return self.blocks * self.block_bytes if self.device.type == "cuda" else 0

    def sleep(self) -> None:
        """Lets the KV cache go, and keeps the weights in host memory. Not of a model that is split over ranks."""
        assert not isinstance(self.decoder, LeadDecoder)
        self.decoder.sleep()

    def wake(self, kv_bytes: int) -> None:
        """Back on the device, with a new cache of `kv_bytes`. Raises LoadFailed when that is too small."""
        assert not isinstance(self.decoder, LeadDecoder)
        self.blocks = kv_bytes // self.block_bytes
        _require_blocks(self.blocks, self.block_bytes, self.max_model_len)
        self.decoder.wake(self.blocks)

    def close(self) -> None:
        """Ends the threads it may have."""
        self.decoder.close()


def _eyes(model: transformers.PreTrainedModel, folder: Path) -> Vision | None:
    return Vision(model, read_processor(folder)) if hasattr(model.config, "vision_config") else None


def pick_device(wanted: str, local_rank: int = 0) -> str:
    """`auto` is the rank's GPU, the first one's when alone, or the CPU."""
    if wanted != "auto":
        return wanted
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"


def device_memory(device: str) -> tuple[str, int, int]:
    """(name, total bytes, free bytes)."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return torch.cuda.get_device_name(device), total, free
    memory = psutil.virtual_memory()
    return "cpu", memory.total, memory.available


def set_threads(count: int, sharing: int = 1) -> None:
    """Threads of one operation. More than there are physical cores, of all processes `sharing` them, only fight each other."""
    torch.set_num_threads(count or max(1, (psutil.cpu_count(logical=False) or 1) // sharing))


def _read(folder: Path, options: RunnerOptions) -> tuple[transformers.PreTrainedModel, frozenset[int]]:
    config = _read_config(folder)
    return _load(folder, config, torch.device(options.device), options.group.size), _eos_ids(folder, config)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        architecture = config["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise LoadFailed(f"{folder.name}: config.json is missing or damaged") from None
    if architecture not in ARCHITECTURES:
        raise LoadFailed(f"{folder.name}: the architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
    return config


def _load(folder: Path, config: dict[str, Any], device: torch.device, ranks: int = 1) -> transformers.PreTrainedModel:
    """The weights: bfloat16 on a GPU; on a CPU as stored, if that is bfloat16 or float32, else float32. Of several ranks each
    reads its share; on CPUs they compute in float32, as one process does, so that tokens agree."""
    architecture: Any = ARCHITECTURES[config["architectures"][0]]
    stored = str(config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype"))
    narrow = device.type == "cuda" or (stored == "bfloat16" and ranks == 1)
    options = {"dtype": torch.bfloat16 if narrow else torch.float32, **split(folder.name, config, ranks)}
    try:
        model = architecture.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise LoadFailed(f"{folder.name}: the weights cannot be read ({type(error).__name__})") from None
    if ranks > 1:
        end_mesh(model)
    return model.to(device).eval().requires_grad_(False)


def _eos_ids(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end an answer, of both config files."""
    ids: set[int] = set()
    generation = folder / "generation_config.json"
    for source in (config, json.loads(generation.read_text()) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return frozenset(ids)


def _block_shape(decoder: Decoder, ranks: int = 1) -> tuple[int, ...]:
    """`kv` of a block, as cache_shapes.py has it."""
    return len(decoder.layers), 2, BLOCK_TOKENS, decoder.kv_heads * ranks, decoder.head_dim


def _block_bytes(decoder: Decoder) -> int:
    return math.prod(_block_shape(decoder)) * (2 if decoder.device.type == "cuda" else 4)


def _blocks_that_fit(block_bytes: int, options: RunnerOptions) -> int:
    """How many blocks the cache may have: by the cap, or by the memory that is free now, which the ranks on a CPU share."""
    if options.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(options.device)[0] * 8 // 10
    else:
        free = psutil.virtual_memory().available // 4 // options.group.local_size
    return int((options.kv_bytes or free) // block_bytes)


def _require_blocks(blocks: int, block_bytes: int, length: int) -> None:
    """Raises LoadFailed for fewer than one sequence needs."""
    least = -(-length // BLOCK_TOKENS) + 1
    if blocks < least:
        raise LoadFailed(
            f"the KV cache needs {least * block_bytes} bytes for one sequence of {length} tokens; "
            "give it more (--kv-bytes) or lower --max-model-len"
        )
