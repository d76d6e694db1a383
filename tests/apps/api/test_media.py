"""Speech, transcripts, embeddings and pictures over HTTP, from real models: Kokoro speaks, Whisper hears it."""

from __future__ import annotations

import base64
import io
import json
import math
import wave
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from asgiref.sync import sync_to_async
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts import auth
from apps.fleet import selectors
from apps.fleet.weights import pull
from tests.apps.api.test_queue import client
from tests.real_site import DaemonProcess, real_site

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.timeout(180)]
SENTENCE = "The quick brown fox jumps over the lazy dog."
REAL = ("kokoro-82m", "minilm-l6-v2", "whisper-tiny.en")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[DaemonProcess]:
    for model in REAL:
        pull(model, models_dir, lambda *_: None)
    log = tmp_path_factory.mktemp("daemon") / "log"
    process = DaemonProcess("w0", REAL, models_dir, log)
    yield process
    process.stop()


@pytest.fixture
async def headers(redis: Redis, daemon: DaemonProcess, settings, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    auth._cache.clear()
    selectors._cache.clear()
    settings.MEDIA_ROOT = tmp_path
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with real_site(redis, daemon):
        yield await client("media")


async def post(headers: dict[str, str], path: str, **body):
    return await AsyncClient().post(path, json.dumps(body), content_type="application/json", headers=headers)


async def speak(headers: dict[str, str], **fields) -> bytes:
    answer = await post(headers, "/v1/audio/speech", **{"model": "kokoro-82m", "voice": "alloy", "input": SENTENCE, **fields})
    if answer.status_code != 200:
        raise AssertionError(answer.content)
    return b"".join([chunk async for chunk in answer.streaming_content])


async def hear(headers: dict[str, str], sound: bytes, name: str = "speech.wav", **fields):
    form = {"model": "whisper-tiny.en", "file": SimpleUploadedFile(name, sound), **fields}
    return await AsyncClient().post("/v1/audio/transcriptions", form, headers=headers)


def words(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").strip()


@pytest.mark.parametrize("form", ["wav", "mp3", "opus", "flac", "aac", "pcm"])
async def test_every_format_says_the_sentence(headers: dict[str, str], form: str) -> None:
    sound = await speak(headers, response_format=form)
    if form == "pcm":
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(24_000)
            out.writeframes(sound)
        sound = file.getvalue()
    with av.open(io.BytesIO(sound)) as container:
        seconds = sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))
    assert 1.5 < seconds < 6
    heard = await hear(headers, sound)
    assert words(heard.json()["text"]) == words(SENTENCE)


async def test_speech_as_events_adds_up_to_the_file(headers: dict[str, str]) -> None:
    stream = (await speak(headers, response_format="pcm", stream_format="sse")).decode()
    frames = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    sound = b"".join(base64.b64decode(f["audio"]) for f in frames if f["type"] == "speech.audio.delta")
    assert sound == await speak(headers, response_format="pcm")
    assert frames[-1]["type"] == "speech.audio.done"
    assert frames[-1]["usage"]["output_tokens"] == len(SENTENCE)
    assert stream.endswith("data: [DONE]\n\n")


async def test_transcripts_are_timed(headers: dict[str, str]) -> None:
    sound = await speak(headers, input=f"{SENTENCE} " * 3)
    verbose = (await hear(headers, sound, response_format="verbose_json")).json()
    assert words(verbose["text"]).count("lazy dog") == 3
    times = [(segment["start"], segment["end"]) for segment in verbose["segments"]]
    assert times == sorted(times)
    assert all(start < end <= verbose["duration"] + 0.5 for start, end in times)
    srt = (await hear(headers, sound, response_format="srt")).content.decode()
    assert srt.startswith("1\n00:00:0")
    assert " --> " in srt
    assert (await hear(headers, sound, response_format="vtt")).content.startswith(b"WEBVTT\n\n00:00:0")
    assert words((await hear(headers, sound, response_format="text")).content.decode()).startswith("the quick")


async def test_a_transcript_streams(headers: dict[str, str]) -> None:
    answer = await hear(headers, await speak(headers), stream="true")
    stream = b"".join([chunk async for chunk in answer.streaming_content]).decode()
    frames = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(frame["delta"] for frame in frames[:-1]) == frames[-1]["text"]
    assert words(frames[-1]["text"]) == words(SENTENCE)


async def test_embeddings_are_alike_where_meanings_are(headers: dict[str, str]) -> None:
    inputs = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stocks fell sharply on Tuesday."]
    answer = (await post(headers, "/v1/embeddings", model="minilm-l6-v2", input=inputs)).json()
    vectors = np.array([entry["embedding"] for entry in answer["data"]])
    assert [entry["index"] for entry in answer["data"]] == [0, 1, 2]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    alike = vectors @ vectors.T
    assert alike[0, 1] > alike[0, 2] + 0.3
    packed = (await post(headers, "/v1/embeddings", model="minilm-l6-v2", input=inputs[0], encoding_format="base64")).json()
    assert np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4") == pytest.approx(vectors[0], abs=1e-5)
    few = (await post(headers, "/v1/embeddings", model="minilm-l6-v2", input=inputs[0], dimensions=64)).json()
    assert math.isclose(np.linalg.norm(few["data"][0]["embedding"]), 1, abs_tol=1e-5)
    assert len(few["data"][0]["embedding"]) == 64


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("/v1/audio/speech", {"voice": "nobody"}, "invalid_value", "voice"),
        ("/v1/audio/speech", {"input": ""}, "invalid_value", "input"),
        ("/v1/audio/speech", {"input": "a" * 4097}, "invalid_value", "input"),
        ("/v1/audio/speech", {"speed": 5}, "invalid_value", "speed"),
        ("/v1/audio/speech", {"response_format": "ogg"}, "invalid_value", "response_format"),
        ("/v1/audio/speech", {"instructions": "cheerfully"}, "unsupported_parameter", "instructions"),
        ("/v1/audio/speech", {"model": "smollm2-135m"}, "model_not_found", "model"),
        ("/v1/embeddings", {"input": ["a", ""]}, "invalid_value", "input[1]"),
        ("/v1/embeddings", {"input": [1, 10**6]}, "invalid_value", "input[0]"),
        ("/v1/embeddings", {"input": "word " * 2000}, "context_length_exceeded", "input[0]"),
        ("/v1/embeddings", {"dimensions": 4000}, "invalid_value", "dimensions"),
        ("/v1/images/generations", {"size": "63x64"}, "invalid_value", "size"),
        ("/v1/images/generations", {"size": "1e9x64"}, "invalid_value", "size"),
        ("/v1/images/generations", {"n": 11}, "invalid_value", "n"),
        ("/v1/images/generations", {"n": 2, "stream": True}, "invalid_value", "n"),
        ("/v1/images/generations", {"style": "vivid"}, "unsupported_parameter", "style"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(headers: dict[str, str], path, body, code, param) -> None:
    good = {
        "/v1/audio/speech": {"model": "kokoro-82m", "voice": "alloy", "input": SENTENCE},
        "/v1/embeddings": {"model": "minilm-l6-v2", "input": "a"},
        "/v1/images/generations": {"model": "sd-turbo", "prompt": "a"},
    }
    answer = await post(headers, path, **{**good[path], **body})
    assert (answer.status_code // 100, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (4, code, param)


async def test_what_is_no_recording_is_refused(headers: dict[str, str]) -> None:
    for sound in (b"", b"RIFF", bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(100)):
        assert (await hear(headers, sound)).json()["error"]["code"] == "invalid_audio"
    missing = await AsyncClient().post("/v1/audio/transcriptions", {"model": "whisper-tiny.en"}, headers=headers)
    assert missing.json()["error"]["param"] == "file"
    other = await hear(headers, b"", language="fr")
    assert other.json()["error"]["param"] == "language"


async def test_voices_are_listed_by_both_their_names(headers: dict[str, str]) -> None:
    found = (await AsyncClient().get("/v1/audio/voices", headers=headers)).json()["voices"]
    assert {"af_heart", "alloy"} <= {voice["id"] for voice in found}
    models = (await AsyncClient().get("/v1/audio/models", headers=headers)).json()["models"]
    assert {model["id"] for model in models} == {"kokoro-82m", "whisper-tiny.en"}
