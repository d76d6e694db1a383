"""The cache shapes against the `transformers` that is on the path: run as a program, so that each test picks its release.

`python -m tests.gpu_daemon.cache_check` builds tiny models with the library's own classes, and lets every greedy answer
change over half-way: from the library through the store's blocks into a fresh cache of the library, from the library into
our decoders, and from our decoders into the library. It prints the release and what was checked, and fails at the first
token that is not the one of an answer without interruption.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from gpu_daemon.engine.sequence import Chunk, Sampling, Sequence
from gpu_daemon.runners.batch import make_batch
from gpu_daemon.runners.cache_shapes import PanelLayout, RowLayout, fill_cache, from_blocks, from_cache, to_blocks, to_legacy
from gpu_daemon.runners.cpu.decoder import CpuDecoder
from gpu_daemon.runners.torch_decoder import TorchDecoder
from gpu_daemon.runners.weights import take_decoder

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 32
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 256, "initializer_range": 0.2,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PROMPT = torch.randint(2, 300, (1, 71), generator=torch.Generator().manual_seed(7))
HALF, ANSWER = 39, 12
LAYOUTS = {"panels": PanelLayout(LAYERS, KV_HEADS, HEAD_DIM), "rows": RowLayout(torch.float32)}
Shape = tuple[Callable[[Any], Any], Callable[[Tensor], Any]]  # what the model gave -> a cache; kv -> what the model takes


def build(kind: str) -> Any:
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def shapes() -> dict[str, Shape]:
    """The shapes this release has: DynamicCache in all, tuples in 4.x."""
    cache = transformers.DynamicCache

    def fresh(kv: Tensor) -> Any:
        return fill_cache(cache(), kv, torch.float32)

    found: dict[str, Shape] = {"layers" if hasattr(cache(), "layers") else "lists": (lambda given: given, fresh)}
    if hasattr(cache, "from_legacy_cache"):
        found["tuples"] = cache.to_legacy_cache, lambda kv: cache.from_legacy_cache(to_legacy(kv, torch.float32))
    return found


@torch.inference_mode()
def run(model: Any, ids: Tensor, past: Any) -> tuple[int, Any]:
    """The likeliest next token, and the cache."""
    result = model(input_ids=ids, past_key_values=past, use_cache=True)
    return int(result.logits[0, -1].argmax()), result.past_key_values


def go_on(model: Any, ids: Tensor, past: Any) -> list[int]:
    """The answer from `past` on, `ids` being what of the prompt it lacks."""
    answer = []
    for _ in range(ANSWER):
        token, past = run(model, ids, past)
        answer.append(token)
        ids = torch.tensor([[token]])
    return answer


class Ours:
    """One of our decoders with one sequence in it, in blocks that are neither the first nor in order."""

    def __init__(self, kind: str, layout: str) -> None:
        options = {"threads": 2} if layout == "panels" else {}
        make: Any = CpuDecoder if layout == "panels" else TorchDecoder
        self.decoder = make(take_decoder(build(kind), 256), blocks=16, length=256, **options)
        self.layout = LAYOUTS[layout]
        self.sequence = Sequence(0, "r", 1, 0, PROMPT[0].tolist(), PROMPT.shape[1], Sampling(ANSWER, 0, 0.0))
        self.sequence.blocks = [9, 2, 14, 5, 7, 3]

    def step(self, start: int, end: int) -> int:
        chunk = Chunk(self.sequence, start, end - start)
        logits = self.decoder(make_batch([chunk]))
        return int(logits[0].argmax()) if chunk.samples else -1

    def save(self, tokens: int) -> Tensor:
        saved = [self.decoder.save(block) for block in self.sequence.blocks]
        return from_blocks(saved, tokens, self.layout)

    def restore(self, kv: Tensor) -> None:
        for block, data in zip(self.sequence.blocks, to_blocks(kv, self.layout), strict=False):
            self.decoder.restore(block, data)

    def answer(self, start: int) -> list[int]:
        tokens = self.sequence.tokens
        while self.sequence.index < ANSWER:
            tokens.append(self.step(start, len(tokens)))
            start = len(tokens) - 1
        return self.sequence.generated


def check(kind: str, shape: Shape, layout: str) -> None:
    give, take = shape
    model, ours = build(kind), Ours(kind, layout)
    expected = go_on(model, PROMPT, transformers.DynamicCache())
    assert len(set(expected)) > 3, "an answer of one token would prove nothing"
    _, half = run(model, PROMPT[:, :HALF], transformers.DynamicCache())
    kv = from_cache(give(half))
    assert kv.shape == (LAYERS, 2, HALF, KV_HEADS, HEAD_DIM)

    stored = from_blocks(to_blocks(kv, ours.layout), HALF, ours.layout)
    assert torch.equal(stored, kv)
    assert go_on(model, PROMPT[:, HALF:], take(stored)) == expected

    ours.restore(kv)
    assert ours.answer(HALF) == expected

    mine = Ours(kind, layout)
    mine.step(0, HALF)
    torch.testing.assert_close(mine.save(HALF), kv, rtol=1e-4, atol=1e-5)
    assert go_on(model, PROMPT[:, HALF:], take(mine.save(HALF))) == expected


def check_model_takes_tuples(kind: str) -> None:
    """Before 4.47 a model took tuples itself, and gave tuples back."""
    model = build(kind)
    _, half = run(model, PROMPT[:, :HALF], None)
    kv = from_cache(half)
    token, past = run(model, PROMPT[:, HALF:], to_legacy(kv, torch.float32))
    assert isinstance(half, tuple)
    assert isinstance(past, tuple)
    assert from_cache(past).shape[2] == PROMPT.shape[1]
    assert token == run(model, PROMPT, None)[0]


def main() -> None:
    done = []
    for kind in ("Llama", "Qwen3"):
        if not hasattr(transformers, f"{kind}ForCausalLM"):
            continue
        for name, shape in shapes().items():
            for layout in LAYOUTS:
                check(kind, shape, layout)
                done.append(f"{kind} {name} {layout}")
    if transformers.__version__.startswith("4.46"):
        check_model_takes_tuples("Llama")
        done.append("Llama takes tuples")
    print(json.dumps({"release": transformers.__version__, "checked": done}))


if __name__ == "__main__":
    main()
