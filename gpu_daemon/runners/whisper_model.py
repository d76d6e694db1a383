"""Whisper's two halves on raw `transformers` modules: windows of sound are heard together, tokens are run as a ragged batch.

A batch's tokens stand in one row, whichever window they belong to, so the weights are read once for all; only attention looks
at each window by itself, and needs no padding.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SAMPLE_RATE = 16000
WINDOW_SECONDS = 30


@dataclass(slots=True)
class Heard:
    """One window as the decoder sees it: keys and values, a pair a layer, each [1, heads, positions, head_dim]. Those of
    `sound` are whole; of `words`, `count` positions are filled."""

    sound: list[tuple[Tensor, Tensor]]
    words: list[tuple[Tensor, Tensor]]
    count: int = 0


Chunk: TypeAlias = tuple[Heard, list[int]]  # a window, and the tokens to add to it


class WhisperModel:
    """One WhisperForConditionalGeneration and its feature extractor."""

    def __init__(self, model: Any, extractor: Any) -> None:
        self._encoder, self._decoder, self._head = model.model.encoder, model.model.decoder, model.proj_out
        self._extractor = extractor
        self.positions = int(model.config.max_target_positions)
        self.device = model.device

    @torch.inference_mode()
    def hear(self, windows: Many[np.ndarray]) -> list[Heard]:
        """Windows of at most 30 s, float32 in [-1, 1]."""
        features = self._extractor(list(windows), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        states = self._encoder(features.to(self.device)).last_hidden_state
        return [self._heard(state[None]) for state in states]

    def _heard(self, state: Tensor) -> Heard:
        sound, words = [], []
        for layer in self._decoder.layers:
            attention = layer.encoder_attn
            sound.append((_split(attention, attention.k_proj(state)), _split(attention, attention.v_proj(state))))
            empty = state.new_empty(1, attention.num_heads, self.positions, attention.head_dim)
            words.append((empty, torch.empty_like(empty)))
        return Heard(sound, words)

    @torch.inference_mode()
    def run(self, chunks: Many[Chunk]) -> Tensor:
        """Adds tokens to windows; the logits that follow the last token of each, [chunks, vocabulary]. More than one token
        goes only into a window that has none."""
        ids = torch.tensor([token for _, tokens in chunks for token in tokens], device=self.device)
        positions = [heard.count + i for heard, tokens in chunks for i in range(len(tokens))]
        states = self._decoder.embed_tokens(ids) * self._decoder.embed_scale + self._decoder.embed_positions.weight[positions]
        for number, layer in enumerate(self._decoder.layers):
            states = states + _attend_words(layer.self_attn, number, layer.self_attn_layer_norm(states), chunks)
            states = states + _attend_sound(layer.encoder_attn, number, layer.encoder_attn_layer_norm(states), chunks)
            states = states + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(states))))
        for heard, tokens in chunks:
            heard.count += len(tokens)
        last = torch.tensor([len(tokens) for _, tokens in chunks], device=self.device).cumsum(0) - 1
        logits: Tensor = self._head(self._decoder.layer_norm(states[last]))
        return logits


def _attend_words(attention: Any, number: int, states: Tensor, chunks: Many[Chunk]) -> Tensor:
    """Layer `number` looks at the tokens so far, which it adds the present ones to."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts = [_parts(attention, project(states), chunks) for project in projections]
    outputs = []
    for (heard, tokens), query, key, value in zip(chunks, *parts, strict=True):
        keys, values = heard.words[number]
        end = heard.count + len(tokens)
        keys[:, :, heard.count : end], values[:, :, heard.count : end] = key, value
        outputs.append(_attention(query, keys[:, :, :end], values[:, :, :end], causal=len(tokens) > 1))
    projected: Tensor = attention.out_proj(torch.cat(outputs))
    return projected


def _attend_sound(attention: Any, number: int, states: Tensor, chunks: Many[Chunk]) -> Tensor:
    """Layer `number` looks at the sound."""
    queries = _parts(attention, attention.q_proj(states), chunks)
    outputs = [_attention(query, *heard.sound[number]) for (heard, _), query in zip(chunks, queries, strict=True)]
    projected: Tensor = attention.out_proj(torch.cat(outputs))
    return projected


def _split(attention: Any, states: Tensor) -> Tensor:
    """[1, tokens, hidden] to [1, heads, tokens, head_dim]."""
    return states.view(1, -1, attention.num_heads, attention.head_dim).transpose(1, 2).contiguous()


def _parts(attention: Any, states: Tensor, chunks: Many[Chunk]) -> list[Tensor]:
    """Each chunk's part of [tokens, hidden], by head."""
    return [_split(attention, part[None]) for part in torch.split(states, [len(tokens) for _, tokens in chunks])]


def _attention(query: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
    """[tokens, hidden]."""
    return scaled_dot_product_attention(query, keys, values, is_causal=causal)[0].transpose(0, 1).flatten(1)
