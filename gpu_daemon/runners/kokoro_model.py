"""Kokoro's own `KModel`, built from a config alone and filled from safetensors: nothing is downloaded, nothing unpickled."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from threading import Lock
from typing import Any

import kokoro.model
import torch
from kokoro import KModel
from kokoro.istftnet import AdainResBlk1d, Decoder, Generator
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import weight_norm

_BUILDING = Lock()  # KModel takes its decoder's class from its module, where it is exchanged for a moment
_PUBLISHED_WIDTHS = {"1024": 1024, "512": 512, "64": 64}
_REPOSITORY = "hexgrad/Kokoro-82M"  # named so that KModel does not print a warning; never reached


def build(config: dict[str, Any]) -> KModel:
    """A KModel with the weights it starts with. `decoder_widths`, of tiny checkpoints, says how wide its decoder is."""
    widths = config.get("decoder_widths", _PUBLISHED_WIDTHS)
    nothing = io.BytesIO()
    torch.save({}, nothing)  # what KModel loads instead of a downloaded checkpoint
    nothing.seek(0)
    with _BUILDING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's way to make LSTMs and weight norms is an old one
        kokoro.model.Decoder = _decoder_class(widths)
        try:
            return KModel(repo_id=_REPOSITORY, config=config, model=nothing)
        finally:
            kokoro.model.Decoder = Decoder


def load(folder: Path) -> KModel:
    """The model in a folder. Raises OSError, ValueError, KeyError or RuntimeError for files that are not one's."""
    model = build(json.loads((folder / "config.json").read_text()))
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    if found.unexpected_keys or set(found.missing_keys) != set(model.state_dict()) - set(saved_names(model)):
        raise ValueError("the weights are not those of the config's model")
    return model.eval()


def saved_names(model: KModel) -> list[str]:
    """What a checkpoint holds: all but the pooler of its BERT, which is never run."""
    return [name for name in model.state_dict() if not name.startswith("bert.pooler.")]


def _decoder_class(widths: dict[str, int]) -> type[Decoder]:
    """The published decoder when the widths are the published ones, else one that differs from it in nothing else."""
    if widths == _PUBLISHED_WIDTHS:
        return Decoder  # type: ignore[no-any-return]
    wide, middle, narrow = widths["1024"], widths["512"], widths["64"]

    class NarrowDecoder(Decoder):
        def __init__(self, dim_in: int, style_dim: int, dim_out: int, disable_complex: bool, **generator: Any) -> None:
            nn.Module.__init__(self)
            joined = wide + 2 + narrow
            self.encode = AdainResBlk1d(dim_in + 2, wide, style_dim)
            self.decode = nn.ModuleList([*(AdainResBlk1d(joined, wide, style_dim) for _ in range(3)),
                                         AdainResBlk1d(joined, middle, style_dim, upsample=True)])  # fmt: skip
            self.F0_conv = weight_norm(nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1))
            self.N_conv = weight_norm(nn.Conv1d(1, 1, kernel_size=3, stride=2, padding=1))
            self.asr_res = nn.Sequential(weight_norm(nn.Conv1d(dim_in, narrow, kernel_size=1)))
            self.generator = Generator(style_dim=style_dim, disable_complex=disable_complex, **generator)

    return NarrowDecoder
