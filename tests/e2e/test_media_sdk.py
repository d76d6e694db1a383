"""The `openai` SDK against every endpoint that is no text, over a stack with every modality."""

from __future__ import annotations

import base64
import io
import json

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.e2e.conftest import RunningStack, until

FORMATS = {"mp3": "mp3", "opus": "opus", "aac": "aac", "flac": "flac", "wav": "pcm_s16le"}  # the codec in each
CLIP = {"model": "cogvideox-2b", "prompt": "A fox runs.", "size": "64x64", "seconds": "1", "extra_body": {"steps": "2"}}
deprecated = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")  # by OpenAI; not here


@pytest.fixture
def client(media_stack: RunningStack):
    with openai.OpenAI(base_url=f"{media_stack.url}/v1", api_key=media_stack.key, max_retries=0, timeout=110) as client:
        yield client


# --- Speech ---


def say(client: openai.OpenAI, text: str = "A fox.", **fields) -> bytes:
    asked = {"model": "kokoro-82m", "voice": "af_heart", "input": text, "response_format": "pcm", **fields}
    return client.audio.speech.create(**asked).content


@pytest.mark.parametrize("form", FORMATS)
def test_speech_of_every_format_can_be_played(client, form: str) -> None:
    with av.open(io.BytesIO(say(client, response_format=form))) as file:
        (stream,) = file.streams.audio
        assert stream.codec_context.codec.canonical_name.startswith(FORMATS[form])
        heard = sum(frame.samples / frame.sample_rate for frame in file.decode(stream))
    assert 0.4 < heard < 4


def test_speech_is_sent_as_it_is_made(client) -> None:
    text = "The first sentence is short. The second one is longer than it, so that it takes more time."
    with client.audio.speech.with_streaming_response.create(
        model="kokoro-82m", voice="af_heart", input=text, response_format="pcm"
    ) as response:
        pieces = list(response.iter_bytes())
    assert len(pieces) > 1
    assert sum(map(len, pieces)) > 3 * 2 * 24_000


def test_voices_are_known_by_openai_s_names_too(client, media_stack: RunningStack) -> None:
    with media_stack.client() as plain:
        voices = {voice["id"] for voice in plain.get("/v1/audio/voices").json()["voices"]}
        models = [model["id"] for model in plain.get("/v1/audio/models").json()["models"]]
    assert {"alloy", "ash", "coral", "echo", "fable", "onyx", "nova", "sage", "shimmer", "verse", "af_alloy"} <= voices
    assert models == ["kokoro-82m", "whisper-tiny.en"]
    assert len(say(client, voice="alloy")) == len(say(client, voice={"id": "af_alloy"})) != len(say(client, voice="onyx"))


def test_fast_speech_is_short(client) -> None:
    assert len(say(client, speed=2)) < 0.7 * len(say(client))


def test_speech_comes_in_events_for_who_asks(client) -> None:
    with client.audio.speech.with_streaming_response.create(
        model="kokoro-82m", voice="alloy", input="A fox.", response_format="pcm", stream_format="sse"
    ) as response:
        *events, done = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    assert {event["type"] for event in events} == {"speech.audio.delta"}
    assert sum(len(base64.b64decode(event["audio"])) for event in events) == len(say(client, voice="alloy"))
    assert done["type"] == "speech.audio.done"
    assert done["usage"]["output_tokens"] > 0


# --- Transcriptions ---


def hear(client: openai.OpenAI, fox: bytes, **fields):
    return client.audio.transcriptions.create(model="whisper-tiny.en", file=("fox.wav", fox), **fields)


def test_a_recording_is_written_down_in_every_format(client, fox: bytes) -> None:
    assert "brown fox jumps over the lazy dog" in hear(client, fox).text.lower()
    assert "brown fox" in hear(client, fox, response_format="text").lower()
    srt, vtt = (hear(client, fox, response_format=form) for form in ("srt", "vtt"))
    assert srt.startswith("1\n00:00:00,000 --> 00:00:0")
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:0")
    told = hear(client, fox, response_format="verbose_json", timestamp_granularities=["segment"])
    assert (told.language, told.segments[0].start) == ("english", 0)
    assert 2 < told.segments[-1].end <= told.duration + 0.5
    assert "brown fox" in told.text.lower()


def test_a_transcript_is_streamed(client, fox: bytes) -> None:
    *deltas, done = list(hear(client, fox, stream=True))
    assert {event.type for event in deltas} == {"transcript.text.delta"}
    assert len(deltas) > 1
    assert done.type == "transcript.text.done"
    assert done.text == "".join(event.delta for event in deltas).strip()
    assert done.usage.input_tokens == 1500


# --- Embeddings ---


def embed(client: openai.OpenAI, given, **fields) -> np.ndarray:
    """(inputs, dimensions)"""
    answer = client.embeddings.create(model="minilm-l6-v2", input=given, **fields)
    assert [datum.index for datum in answer.data] == list(range(len(answer.data)))
    return np.array([datum.embedding for datum in answer.data])


def test_embeddings_mean_something_and_are_the_same_in_every_encoding(client) -> None:
    vectors = embed(client, ["A cat sat.", "A kitten was sitting.", "Interest rates rose."])  # the SDK asks for base64
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    np.testing.assert_allclose(vectors[:1], embed(client, "A cat sat.", encoding_format="float"), atol=1e-6)


def test_token_ids_are_embedded_as_their_text_is(client) -> None:
    ids = [101, 1037, 4937, 2938, 1012, 102]  # [CLS] a cat sat . [SEP]
    np.testing.assert_allclose(embed(client, ids), embed(client, "A cat sat."), atol=1e-5)
    assert embed(client, [ids, ids]).shape == (2, 384)


def test_fewer_dimensions_are_the_first_ones_at_length_1(client) -> None:
    whole, short = embed(client, "A cat sat.")[0], embed(client, "A cat sat.", dimensions=64)[0]
    np.testing.assert_allclose(short, whole[:64] / np.linalg.norm(whole[:64]), atol=1e-5)


def test_a_thousand_inputs_at_once(client) -> None:
    vectors = embed(client, [f"Number {number}." for number in range(1000)])
    assert vectors.shape == (1000, 384)
    np.testing.assert_allclose(vectors[707], embed(client, "Number 707.")[0], atol=1e-4)


# --- Images ---


def draw(client: openai.OpenAI, **fields):
    seed = fields.pop("seed", 7)
    asked = {"model": "sd-turbo", "prompt": "a fox", "size": "128x64", **fields}
    return client.images.generate(**asked, extra_body={"seed": seed})


def test_a_seed_makes_the_same_bytes_and_pictures_of_one_call_differ(client) -> None:
    first = draw(client, n=2, response_format="b64_json")
    again = draw(client, n=2, response_format="b64_json")
    assert [datum.b64_json for datum in first.data] == [datum.b64_json for datum in again.data]
    assert first.data[0].b64_json != first.data[1].b64_json
    with Image.open(io.BytesIO(base64.b64decode(first.data[0].b64_json))) as image:
        assert (image.format, image.size) == ("PNG", (128, 64))
    assert (first.size, first.output_format, first.quality) == ("128x64", "png", "auto")


def test_a_link_opens_without_a_key_and_only_as_it_was_given(client) -> None:
    (datum,) = draw(client, output_format="webp").data
    found = httpx.get(datum.url)
    assert (found.status_code, found.headers["content-type"]) == (200, "image/webp")
    with Image.open(io.BytesIO(found.content)) as image:
        assert (image.format, image.size) == ("WEBP", (128, 64))
    assert httpx.get(datum.url[:-3] + "abc").status_code == 404


def test_a_link_lapses(media_stack: RunningStack) -> None:
    made = (
        "import time; from apps.core import media; name = media.save(b'x', 'image/png'); "
        "print(media.token(name, 'image/png')); then = time.time() - media.LINK_SECONDS - 1; "
        "time.time = lambda: then; print(media.token(name, 'image/png'))"
    )
    fresh, old = media_stack.manage("shell", "--no-imports", "-c", made).split()
    with httpx.Client(base_url=media_stack.url) as stranger:
        assert stranger.get(f"/v1/media/{fresh}").content == b"x"
        assert stranger.get(f"/v1/media/{old}").status_code == 404


def test_a_picture_is_streamed_with_sketches(client) -> None:
    *sketches, whole = list(draw(client, stream=True, partial_images=2, quality="high"))
    assert [(event.type, event.partial_image_index) for event in sketches] == [
        ("image_generation.partial_image", number) for number in range(2)
    ]
    assert whole.type == "image_generation.completed"
    assert whole.b64_json == draw(client, quality="high", response_format="b64_json").data[0].b64_json
    assert whole.usage.output_tokens > 0


# --- Videos ---


@deprecated
def test_a_video_is_made_listed_downloaded_and_deleted(client) -> None:
    queued = client.videos.create(**CLIP)
    assert queued.status == "queued"
    done = client.videos.create_and_poll(**CLIP)
    assert (done.status, done.progress, done.seconds, done.size) == ("completed", 100, "1", "64x64")
    assert [video.id for video in client.videos.list(limit=1)][:2] == [done.id, queued.id]
    assert client.videos.retrieve(done.id) == done
    with av.open(io.BytesIO(client.videos.download_content(done.id).read())) as file:
        frames = list(file.decode(video=0))
    assert (len(frames), frames[0].width, frames[0].height) == (9, 64, 64)
    for video in (done, queued):
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


@deprecated
def test_what_a_video_cannot_be_made_from_is_refused_by_name(client) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.videos.create(**CLIP, input_reference=("fox.png", b"x"))
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "input_reference")


# --- Files and batches ---


def test_files_are_kept_paged_read_and_deleted(client) -> None:
    made = [client.files.create(file=(f"{n}.txt", f"file {n}".encode()), purpose="user_data") for n in range(5)]
    assert (made[0].filename, made[0].bytes, made[0].purpose) == ("0.txt", 6, "user_data")
    paged = client.files.list(purpose="user_data", limit=2, order="asc", after=made[0].id)
    assert [file.id for file in paged] == [file.id for file in made[1:]]  # two pages, by their cursor
    assert client.files.retrieve(made[0].id) == made[0]
    assert client.files.content(made[3].id).read() == b"file 3"
    for file in made:
        assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(made[0].id)


def test_a_file_may_lapse(client) -> None:
    file = client.files.create(
        file=("a.txt", b"x"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert abs(file.expires_at - file.created_at - 3600) <= 1


def test_a_batch_is_answered_line_by_line(client) -> None:
    bodies = [{"model": "minilm-l6-v2", "input": "A cat sat."}, {"model": "minilm-l6-v2", "input": ""}]
    lines = [
        json.dumps({"custom_id": f"line-{n}", "method": "POST", "url": "/v1/embeddings", "body": body})
        for n, body in enumerate(bodies)
    ]
    file = client.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"of": "test"}
    )
    assert batch.status == "validating"
    batch = until(lambda: client.batches.retrieve(batch.id), lambda batch: batch.status == "completed")
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (2, 1, 1)
    assert batch.metadata == {"of": "test"}
    (answered,) = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    (failed,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert (answered["custom_id"], answered["response"]["status_code"]) == ("line-0", 200)
    np.testing.assert_allclose(answered["response"]["body"]["data"][0]["embedding"], embed(client, "A cat sat.")[0], atol=1e-5)
    assert (failed["custom_id"], failed["response"]["body"]["error"]["code"]) == ("line-1", "invalid_value")
    assert batch.id in [found.id for found in client.batches.list(limit=100)]
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)  # too late


def test_a_batch_keeps_what_no_database_takes(client) -> None:
    """Models may say NUL."""
    body = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1,
        "logit_bias": {"190": 100},
    }
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("lines.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    batch = until(lambda: client.batches.retrieve(batch.id), lambda batch: batch.status == "completed")
    answered = json.loads(client.files.content(batch.output_file_id).text)
    assert answered["response"]["body"]["choices"][0]["message"]["content"] == "\0"


# --- Models ---


def test_models_say_what_they_are(client) -> None:
    models = {model.id: model.to_dict() for model in client.models.list()}
    tiny = {name for name, model in models.items() if model["tiny"]}
    assert tiny == {"sd-turbo", "cogvideox-2b", "qwen2.5-vl-3b", "qwen3-14b"}
    assert models["kokoro-82m"]["modality"] == "speech"
    assert models["qwen3-14b"]["thinking"]
    assert client.models.retrieve("sd-turbo").id == "sd-turbo"
