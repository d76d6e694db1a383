"""Sound from strangers in, sound for clients out: decoded under bounds, encoded as it comes. PyAV does both."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import av.error
import numpy as np

from apps.core.errors import InvalidRequest

SPEECH_RATE = 24_000  # of what a voice speaks: mono s16le
HEARD_RATE = 16_000  # of what a transcriber hears: mono s16le
MAX_SECONDS = 30 * 60
_CONTAINERS = frozenset({"wav", "mp3", "ogg", "flac", "aac", "matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2", "mpeg", "mpegts"})


@dataclass(frozen=True, slots=True)
class Format:
    """How PyAV writes it; `container` is empty for what is sent as it is."""

    mime: str
    container: str = ""
    codec: str = ""


FORMATS = {
    "mp3": Format("audio/mpeg", "mp3", "libmp3lame"),
    "opus": Format("audio/ogg", "ogg", "libopus"),
    "aac": Format("audio/aac", "adts", "aac"),
    "flac": Format("audio/flac", "flac", "flac"),
    "wav": Format("audio/wav", "wav", "pcm_s16le"),
    "pcm": Format("audio/pcm"),
}


class SpeechEncoder:
    """Speech piece by piece into one file, of which every piece's bytes can be sent as soon as they are there."""

    def __init__(self, form: Format) -> None:
        self._form = form
        self._written = _Written()
        self._samples = 0
        if form.container:
            self._container = av.open(self._written, "w", format=form.container)
            self._stream: Any = self._container.add_stream(form.codec, rate=SPEECH_RATE, layout="mono")

    def push(self, pcm: bytes) -> bytes:
        """What the file grows by."""
        if not self._form.container:
            return pcm
        frame = av.AudioFrame.from_ndarray(np.frombuffer(pcm, "<i2")[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = SPEECH_RATE, self._samples
        self._samples += frame.samples
        self._container.mux(self._stream.encode(frame))
        return self._written.take()

    def finish(self) -> bytes:
        """The file's end."""
        if not self._form.container:
            return b""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._written.take()


class _Written:
    """A file that can only be written on, so that no muxer goes back to change what was sent."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


def decode(data: bytes) -> bytes:
    """A recording as a transcriber hears it. Raises InvalidRequest; takes seconds for a long one, so call it in a thread."""
    try:
        with av.open(io.BytesIO(data), metadata_errors="replace") as container:
            if container.format.name not in _CONTAINERS or not container.streams.audio:
                raise _unreadable()
            heard = b"".join(_bounded(container))
    except (av.error.FFmpegError, ValueError, OSError, EOFError):
        raise _unreadable() from None
    if not heard:
        raise _unreadable()
    return heard


def _bounded(container: Any) -> Iterator[bytes]:
    resampler = av.AudioResampler(format="s16", layout="mono", rate=HEARD_RATE)
    left = MAX_SECONDS * HEARD_RATE
    for frame in container.decode(audio=0):
        for part in resampler.resample(frame):
            left -= part.samples
            if left < 0:
                raise InvalidRequest(
                    f"file: a recording may be {MAX_SECONDS // 60} minutes long.", code="audio_too_long", param="file"
                )
            yield part.to_ndarray().astype("<i2").tobytes()
    for part in resampler.resample(None):
        yield part.to_ndarray().astype("<i2").tobytes()


def _unreadable() -> InvalidRequest:
    return InvalidRequest(
        "file: is no recording that can be read. Send flac, mp3, mp4, mpeg, mpga, m4a, ogg, wav or webm.",
        code="invalid_audio",
        param="file",
    )
