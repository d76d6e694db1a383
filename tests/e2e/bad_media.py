"""What strangers send where sound, pictures, videos, files and batches are taken, and the exact answer: as bad_input.py."""

from __future__ import annotations

import json
from typing import Any

from tests.e2e.bad_input import Bad

UNSUPPORTED, MISSING = "unsupported_parameter", "missing_required_parameter"
ADDRESSES = {
    "speech": "/v1/audio/speech", "transcription": "/v1/audio/transcriptions", "embeddings": "/v1/embeddings",
    "images": "/v1/images/generations", "videos": "/v1/videos", "files": "/v1/files", "batches": "/v1/batches",
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "speech": {"model": "kokoro-82m", "input": "Hi.", "voice": "alloy"},
    "embeddings": {"model": "minilm-l6-v2", "input": "hi"},
    "images": {"model": "sd-turbo", "prompt": "a fox", "size": "64x64"},
    "videos": {"model": "cogvideox-2b", "prompt": "a fox", "size": "64x64"},
    "batches": {"input_file_id": "file-x", "endpoint": "/v1/embeddings", "completion_window": "24h"},
}
BOUNDARY = "xYzZy"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
Part = tuple[str, bytes] | tuple[str, bytes, str]  # name, content, and a file's name


def bad(kind: str, param: str | None, code: str = "invalid_value", status: int = 400, **changed: Any) -> Bad:
    """A change to a good body; None removes a field."""
    body = {name: value for name, value in {**GOOD[kind], **changed}.items() if value is not None}
    told = ", ".join(f"{name}={str(value)[:20]!r}" for name, value in changed.items())
    return Bad(f"{kind}: {told}", status, code, param, raw=json.dumps(body).encode(), endpoint=ADDRESSES[kind])


def multipart(*parts: Part) -> bytes:
    lines = []
    for name, content, *file in parts:
        of_file = f'; filename="{file[0]}"' if file else ""
        lines += [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{of_file}\r\n\r\n'.encode(), content, b"\r\n"]
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()])


def form(name: str, kind: str, param: str | None, code: str, *parts: Part, status: int = 400, **more: Any) -> Bad:
    given = {"raw": multipart(*parts), "headers": FORM, **more}
    return Bad(f"{kind}: {name}", status, code, param, endpoint=ADDRESSES[kind], **given)


def at(name: str, path: str, status: int = 404, code: str = "not_found", param: str | None = None, method: str = "GET") -> Bad:
    return Bad(f"{method} {name}", status, code, param, method=method, endpoint=path)


SPEECH = [
    bad("speech", "input", input=""),
    bad("speech", "input", input="x" * 4097),
    bad("speech", "input", input=5),
    bad("speech", "input", input="a\0b"),
    bad("speech", "input", MISSING, input=None),
    bad("speech", "voice", MISSING, voice=None),
    bad("speech", "voice", voice="../../etc/passwd"),
    bad("speech", "voice", voice=",".join(["af_heart"] * 6)),
    bad("speech", "voice.name", UNSUPPORTED, voice={"name": "alloy"}),
    bad("speech", "speed", speed=0.2),
    bad("speech", "speed", speed="fast"),
    bad("speech", "response_format", response_format="exe"),
    bad("speech", "stream_format", stream_format="websocket"),
    bad("speech", "instructions", UNSUPPORTED, instructions="x"),
    bad("speech", "model", "model_not_found", 404, model="../kokoro-82m"),
    bad("speech", "model", "model_not_found", 404, model="smollm2-135m"),
]
EMBEDDINGS = [
    bad("embeddings", "input", MISSING, input=None),
    bad("embeddings", "input[0]", input=""),
    bad("embeddings", "input", input=[]),
    bad("embeddings", "input", input=["x"] * 2049),
    bad("embeddings", "input[0]", input=[10**9]),
    bad("embeddings", "input[0]", input=[-1]),
    bad("embeddings", "input[0]", "context_length_exceeded", input="word " * 300),
    bad("embeddings", "input", input="a\0b"),
    bad("embeddings", "input", input={"text": "x"}),
    bad("embeddings", "dimensions", dimensions=0),
    bad("embeddings", "dimensions", dimensions=385),
    bad("embeddings", "encoding_format", encoding_format="hex"),
]
IMAGES = [
    bad("images", "prompt", MISSING, prompt=None),
    bad("images", "prompt", prompt=""),
    bad("images", "prompt", prompt="x" * 4001),
    bad("images", "prompt", prompt="a\0b"),
    bad("images", "size", size="65x64"),
    bad("images", "size", size="100000x64"),
    bad("images", "size", size="64"),
    bad("images", "size", size=[64, 64]),
    bad("images", "n", n=0),
    bad("images", "n", n=11),
    bad("images", "n", n=2, stream=True),
    bad("images", "steps", steps=5),
    bad("images", "steps", steps=2, quality="high"),
    bad("images", "partial_images", partial_images=1),
    bad("images", "output_compression", output_compression=50),
    bad("images", "background", background="transparent"),
    bad("images", "seed", seed=2**64),
    bad("images", "style", UNSUPPORTED, style="vivid"),
    at("a link that is none", "/v1/media/x"),
    at("a link out of the folder", "/v1/media/..%2f..%2fetc%2fpasswd"),
]
VIDEOS = [
    bad("videos", "prompt", MISSING, prompt=None),
    bad("videos", "prompt", prompt="a\0b"),
    bad("videos", "seconds", seconds="0"),
    bad("videos", "seconds", seconds="7"),
    bad("videos", "seconds", seconds="1e9"),
    bad("videos", "frames", frames=10),
    bad("videos", "frames", frames=9, seconds=1),
    bad("videos", "size", size="64x65"),
    bad("videos", "size", size="9" * 21),
    bad("videos", "steps", steps=51),
    bad("videos", "guidance_scale", guidance_scale=0.5),
    bad("videos", "seed", seed=-1),
    bad("videos", "remix", UNSUPPORTED, remix="x"),
    form("a picture to begin with", "videos", "input_reference", UNSUPPORTED, ("model", b"cogvideox-2b"), ("prompt", b"x"),
         ("input_reference", b"x", "x.png")),
    at("no such video", "/v1/videos/video_x"),
    at("a video with a NUL", "/v1/videos/video_%00"),
    at("content of no video", "/v1/videos/video_x/content"),
    at("no such video", "/v1/videos/video_x", method="DELETE"),
    at("no such video's end", "/v1/videos/video_x/cancel", method="POST"),
    at("videos before", "/v1/videos?before=video_x", 400, UNSUPPORTED, "before"),
    at("no videos at all", "/v1/videos?limit=0", 400, "invalid_value", "limit"),
    at("many digits of videos", "/v1/videos?limit=000000001" + "9" * 5000, 400, "invalid_value", "limit"),
    at("videos in disorder", "/v1/videos?order=random", 400, "invalid_value", "order"),
    at("videos after none of them", "/v1/videos?after=video_x", 400, "invalid_value", "after"),
    at("videos after a NUL", "/v1/videos?after=%00", 400, "invalid_value", "after"),
]  # fmt: skip
HEARD = ("file", b"not a sound", "a.wav")
MODEL = ("model", b"whisper-tiny.en")
TRANSCRIPTIONS = [
    form("no sound", "transcription", "file", "invalid_audio", MODEL, HEARD),
    form("nothing", "transcription", "file", "invalid_audio", MODEL, ("file", b"", "a.wav")),
    form("a playlist", "transcription", "file", "invalid_audio", MODEL, ("file", b"#EXTM3U\nfile:///etc/passwd\n", "a.m3u8")),
    form("no file", "transcription", "file", MISSING, MODEL),
    form("a file as text", "transcription", "file", UNSUPPORTED, MODEL, ("file", b"x")),
    form("two files", "transcription", "file", "invalid_form", MODEL, HEARD, HEARD),
    form("another file", "transcription", "speaker", UNSUPPORTED, MODEL, HEARD, ("speaker", b"x", "a.wav")),
    form("two models", "transcription", "model", "invalid_form", MODEL, MODEL, HEARD),
    form("no model", "transcription", "model", MISSING, HEARD),
    form("a deaf model", "transcription", "model", "model_not_found", ("model", b"smollm2-135m"), HEARD, status=404),
    form("another language", "transcription", "language", "invalid_value", MODEL, HEARD, ("language", b"de")),
    form("heat", "transcription", "temperature", "invalid_value", MODEL, HEARD, ("temperature", b"warm")),
    form("a NUL", "transcription", "prompt", "invalid_value", MODEL, HEARD, ("prompt", b"a\0b")),
    form("times of words", "transcription", "timestamp_granularities[0]", "invalid_value", MODEL, HEARD,
         ("timestamp_granularities[]", b"word")),
    form("subtitles in a stream", "transcription", "stream", "invalid_value", MODEL, HEARD, ("stream", b"true"),
         ("response_format", b"srt")),
    form("no boundary", "transcription", None, "invalid_form", headers={"Content-Type": "multipart/form-data"}),
    form("no form", "transcription", None, "unsupported_media_type", status=415, raw=b"{}",
         headers={"Content-Type": "application/json"}),
    form("a form of one line", "transcription", None, "unsupported_media_type", status=415, raw=b"model=x",
         headers={"Content-Type": "application/x-www-form-urlencoded"}),
]  # fmt: skip
PURPOSE = ("purpose", b"batch")
FILES = [
    form("no file", "files", "file", MISSING, PURPOSE),
    form("an empty file", "files", "file", "invalid_value", PURPOSE, ("file", b"", "a.jsonl")),
    form("no purpose", "files", "purpose", MISSING, ("file", b"x", "a")),
    form("a strange purpose", "files", "purpose", "invalid_value", ("purpose", b"mischief"), ("file", b"x", "a")),
    form("a short life", "files", "expires_after.seconds", "invalid_value", PURPOSE, ("file", b"x", "a"),
         ("expires_after[anchor]", b"created_at"), ("expires_after[seconds]", b"1")),
    form("10,000 fields", "files", None, "invalid_form", *[(f"f{n}", b"x") for n in range(10_000)]),
    form("a field of 5 MB", "files", "purpose", "invalid_value", ("purpose", b"x" * 5_000_000), ("file", b"x", "a")),
    form("a name of 10,000", "files", None, "invalid_form", PURPOSE, ("file", b"x", "x" * 10_000)),
    form("half a life", "files", "expires_after.seconds", MISSING, PURPOSE, ("expires_after[anchor]", b"created_at")),
    form("two lives", "files", "expires_after", "invalid_form", PURPOSE, ("expires_after", b"x"),
         ("expires_after[anchor]", b"created_at")),
    form("a form within", "files", "purpose", "invalid_form", PURPOSE, ("x", multipart(PURPOSE, ("file", b"x", "a")))),
    form("garbage", "files", None, "invalid_form", raw=b"\0\xff" * 1000),
    form("half a form", "files", "purpose", MISSING, raw=multipart(PURPOSE)[:40]),
    at("files of a strange purpose", "/v1/files?purpose=%00", 400, "invalid_value", "purpose"),
    at("no such file", "/v1/files/file-x"),
    at("a file's path", "/v1/files/..%2f..%2fetc%2fpasswd"),
    at("content of no file", "/v1/files/file-x/content"),
    at("no such file", "/v1/files/file-x", method="DELETE"),
]  # fmt: skip
BATCHES = [
    bad("batches", "input_file_id"),
    bad("batches", "input_file_id", MISSING, input_file_id=None),
    bad("batches", "input_file_id", input_file_id="file-\0"),
    bad("batches", "endpoint", endpoint="/v1/files"),
    bad("batches", "completion_window", completion_window="1h"),
    bad("batches", "metadata", metadata={str(n): "x" for n in range(17)}),
    bad("batches", "metadata.a", metadata={"a": "b\0"}),
    bad("batches", "metadata.a", metadata={"a": {"b": "c"}}),
    bad("batches", "output_expires_after", UNSUPPORTED, output_expires_after={}),
    at("no such batch", "/v1/batches/batch_x"),
    at("no such batch's end", "/v1/batches/batch_x/cancel", method="POST"),
    at("batches after a file", "/v1/batches?after=file-x", 400, "invalid_value", "after"),
]
BAD_MEDIA = [*SPEECH, *EMBEDDINGS, *IMAGES, *VIDEOS, *TRANSCRIPTIONS, *FILES, *BATCHES]
