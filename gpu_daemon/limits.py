"""The largest work that is taken at once: runners hold to it, and what a model will take of a device is counted with it."""

from __future__ import annotations

from typing import Final

PHONEMES: Final = 510  # of a piece of speech
SPEECH_TASKS: Final = {"cpu": 8, "cuda": 32}

EMBED_TOKENS: Final = 4096  # of a padded batch

WINDOW_TASKS: Final = {"cpu": 8, "cuda": 32}  # windows of sound that are being transcribed
WINDOWS_HEARD: Final = {"cpu": 1, "cuda": 8}  # in one step

IMAGE_SIDE: Final = 1024
# Pixels that go through the network together: eight images of 512 x 512, or two of the largest; on a CPU one of those.
DENOISED_PIXELS: Final = {"cpu": 1 << 20, "cuda": 1 << 21}
# Pixels decoded in one step: the decoder's memory grows with them, and so does everyone's wait. A CPU gains nothing from more
# than its cache holds, and loses by it: eight images of 256 x 256 take twice as long together as one by one.
DECODED_PIXELS: Final = {"cpu": 1 << 14, "cuda": 1 << 20}

VIDEO_FRAMES: Final = 49
VIDEO_TASKS: Final = 8
VIDEO_TOKENS: Final = 16_384  # of a forward pass, unless one video has more: more of them take longer, and gain nothing

SEEN_TOKENS: Final = 16_384  # of the pictures seen last, which are remembered
