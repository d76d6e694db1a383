"""What Whisper's generation config says of a transcript: how it starts, what it may not say, how its timestamps go."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperTimeStampLogitsProcessor

from gpu_daemon.engine.task import TranscribeWork
from gpu_daemon.errors import InvalidCommand, LoadFailed

_STAMPS_A_SECOND = 50


class Rules:
    """Of one model."""

    def __init__(self, generation: Any, vocab_size: int, positions: int) -> None:
        """Raises LoadFailed."""
        self._generation = generation
        self._vocab_size = vocab_size
        self._before = positions // 2 - 1  # tokens of a prompt that are looked at
        self.most = positions // 2  # tokens of a window
        try:
            self.end = int(generation.eos_token_id)
            self._start = int(generation.decoder_start_token_id)
            self._no_stamps = int(generation.no_timestamps_token_id)
        except (AttributeError, TypeError):
            raise LoadFailed("generation_config.json is none of Whisper's") from None
        self._languages: dict[str, int] = getattr(generation, "lang_to_id", None) or {}
        self._never = self._forbidden(generation.suppress_tokens)
        self._not_first = self._forbidden(generation.begin_suppress_tokens)

    def _forbidden(self, tokens: Many[int] | None) -> Tensor:
        """Added to logits, rules tokens out: [vocabulary]."""
        added = torch.zeros(self._vocab_size)
        added[list(tokens or ())] = float("-inf")
        return added

    def check(self, work: TranscribeWork) -> None:
        """Raises InvalidCommand."""
        if self._languages and f"<|{work.language}|>" not in self._languages:
            raise InvalidCommand(f"this model does not know the language {work.language!r}")
        if not self._languages and work.language != "en":
            raise InvalidCommand("this model knows English only")
        if not all(0 <= token < self.end for token in work.prompt_ids):
            raise InvalidCommand(f"a prompt's token is at least 0 and below {self.end}")

    def start(self, work: TranscribeWork, prompted: bool) -> list[int]:
        """The tokens before a window's own."""
        tokens = [self._start]
        if prompted and work.prompt_ids and (before := getattr(self._generation, "prev_sot_token_id", None)) is not None:
            tokens = [before, *work.prompt_ids[-self._before :], self._start]
        if self._languages:
            tokens += [self._languages[f"<|{work.language}|>"], self._generation.task_to_id["transcribe"]]
        return tokens if work.timestamps else [*tokens, self._no_stamps]

    def stamp(self, seconds: float) -> int:
        """The timestamp of so many seconds after a window's beginning."""
        return self._no_stamps + 1 + round(seconds * _STAMPS_A_SECOND)

    def allow(self, logits: Tensor, window: list[int], begin: int, timestamps: bool) -> Tensor:
        """`logits` [vocabulary] without what may not follow `window`, whose own tokens begin at `begin`."""
        logits = logits.cpu() + self._never
        if len(window) == begin:
            logits += self._not_first
        if not timestamps:
            return logits
        stamps = WhisperTimeStampLogitsProcessor(self._generation, begin_index=begin)
        allowed: Tensor = stamps(torch.tensor([window]), logits[None])[0]
        return allowed
