"""Kokoro from a folder (config.json, model.safetensors, voices.safetensors), and how it speaks.

A batch speaks as each alone: what reads a text (PL-BERT, the encoders, the LSTMs of durations and prosody) runs once for all,
padded and packed; what makes the sound normalises over a whole utterance, so each has that to itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kokoro import KModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.overrides import TorchFunctionMode

from gpu_daemon.errors import LoadFailed
from gpu_daemon.limits import PHONEMES
from gpu_daemon.runners import kokoro_model

SAMPLE_RATE = 24000
_VOICE_SHAPE = (PHONEMES, 1, 256)  # a row for each length of what is said
_STYLE = 128  # columns of a voice that colour the sound; the rest are its prosody


def load(folder: Path, device: torch.device) -> tuple[KModel, dict[str, Tensor]]:
    """(the model, its voices: each [510, 1, 256]). Raises LoadFailed."""
    try:
        model = kokoro_model.load(folder)
        found = load_file(folder / "voices.safetensors")
        voices = {name: voice.to(device, copy=True) for name, voice in found.items()}  # not in the file, which may be replaced
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise LoadFailed(f"{folder.name}: the weights cannot be read ({type(error).__name__})") from None
    if any(voice.shape != _VOICE_SHAPE for voice in voices.values()):
        raise LoadFailed(f"{folder.name}: a voice has the shape {_VOICE_SHAPE}")
    return fuse(model).to(device), voices


def fuse(model: KModel) -> KModel:
    """Multiplies out the weight norms, which would be computed again in every call."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Utterance:
    """`ids` with the end marks around them; `style` is a row of a voice, [256]; what the sound has of chance is by `seed`."""

    ids: list[int]
    style: Tensor
    speed: float
    seed: int


@torch.inference_mode()
def speak(model: KModel, batch: Many[Utterance]) -> list[Tensor]:
    """The sound of each, [samples], in float32 on the CPU."""
    lengths = torch.tensor([len(utterance.ids) for utterance in batch])
    ids = pad_sequence([torch.tensor(utterance.ids) for utterance in batch], batch_first=True).to(model.device)
    styles = torch.stack([utterance.style for utterance in batch]).to(model.device)
    padding = (torch.arange(ids.shape[1]) >= lengths[:, None]).to(model.device)
    encoded = model.bert_encoder(model.bert(ids, attention_mask=(~padding).int())).transpose(1, 2)
    features = model.predictor.text_encoder(encoded, styles[:, _STYLE:], lengths, padding)
    durations = _durations(model, features, lengths, [utterance.speed for utterance in batch])
    texts = model.text_encoder(ids, lengths, padding).transpose(1, 2)
    prosody = _stretch(features, durations)
    read = _run_packed(model.predictor.shared, pad_sequence(prosody, batch_first=True), torch.tensor([len(p) for p in prosody]))
    return [
        _sound(model, text, read[row, : len(text)], styles[row], batch[row].seed)
        for row, text in enumerate(_stretch(texts, durations))
    ]


def _durations(model: KModel, features: Tensor, lengths: Tensor, speeds: list[float]) -> list[Tensor]:
    """Frames of each phoneme, of each utterance."""
    logits = model.predictor.duration_proj(_run_packed(model.predictor.lstm, features, lengths))
    frames = torch.sigmoid(logits).sum(-1) / torch.tensor(speeds, device=logits.device)[:, None]
    frames = frames.round().clamp(min=1).long()
    return [row[:length] for row, length in zip(frames, lengths.tolist(), strict=True)]


def _stretch(features: Tensor, durations: list[Tensor]) -> list[Tensor]:
    """From a row a phoneme to a row a frame: [frames, channels] of each utterance."""
    return [row[: len(d)].repeat_interleave(d, 0) for row, d in zip(features, durations, strict=True)]


def _run_packed(lstm: torch.nn.LSTM, padded: Tensor, lengths: Tensor) -> Tensor:
    """Each row runs to its own end, in both directions."""
    output, _ = lstm(pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(output, batch_first=True)[0]


def _sound(model: KModel, text: Tensor, read: Tensor, style: Tensor, seed: int) -> Tensor:
    """One utterance: `text` and `read` are [frames, channels]."""
    sound_style, prosody_style = style[None, :_STYLE], style[None, _STYLE:]
    pitch = energy = read.T[None]
    for block in model.predictor.F0:
        pitch = block(pitch, prosody_style)
    for block in model.predictor.N:
        energy = block(energy, prosody_style)
    pitch, energy = model.predictor.F0_proj(pitch)[:, 0], model.predictor.N_proj(energy)[:, 0]
    with _Seeded(seed, model.device):
        sound: Tensor = model.decoder(text.T[None], pitch, energy, sound_style)
    return sound.flatten().float().cpu()


class _Seeded(TorchFunctionMode):
    """Within it, what the sound's source draws (phases, noise) comes from a generator of its own."""

    def __init__(self, seed: int, device: torch.device) -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.rand:
            return func(*args, **kwargs, generator=self._generator)
        if func is torch.randn_like:
            return torch.randn(args[0].shape, device=args[0].device, dtype=args[0].dtype, generator=self._generator)
        return func(*args, **kwargs)
