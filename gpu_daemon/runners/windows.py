"""Cuts sound into windows that are short enough to be heard at once, where it is quiet."""

from __future__ import annotations

import numpy as np

_FRAME_SECONDS = 0.02  # as long as a step of the timestamps
_SEARCHED_SECONDS = 5
_QUIET_FRAMES = 5  # how long a pause between words is


def cut_windows(sound: np.ndarray, *, rate: int, seconds: int) -> list[np.ndarray]:
    """Each at most `seconds` long and, but for the last, a whole number of frames."""
    windows = []
    while len(sound) > seconds * rate:
        end = _quietest(sound[: seconds * rate], int(rate * _FRAME_SECONDS), rate * _SEARCHED_SECONDS)
        windows.append(sound[:end])
        sound = sound[end:]
    return [*windows, sound]


def _quietest(sound: np.ndarray, frame: int, searched: int) -> int:
    """The middle of the quietest pause among the last `searched` samples."""
    energy = (sound[-searched:].reshape(-1, frame) ** 2).mean(1)
    pauses = np.convolve(energy, np.ones(_QUIET_FRAMES), mode="valid")
    return len(sound) - searched + (int(pauses.argmin()) + _QUIET_FRAMES // 2) * frame
