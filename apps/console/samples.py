"""The quickstart's samples: one call of each modality by OpenAI's Python SDK, given `client`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    title: str
    code: str


SAMPLES = (
    Sample(
        "Look at a picture",
        """\
import base64

picture = base64.b64encode(open("picture.png", "rb").read()).decode()
answer = client.chat.completions.create(
    model="qwen2.5-vl-3b",
    messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": "What is this?"},
    ]}],
    max_tokens=100,
)
print(answer.choices[0].message.content)""",
    ),
    Sample(
        "Think first",
        """\
thoughtful = client.chat.completions.create(
    model="qwen3-14b",
    messages=[{"role": "user", "content": "Is 91 prime?"}],
    reasoning_effort="medium",
    max_tokens=1000,
)
message = thoughtful.choices[0].message
print("thought:", getattr(message, "reasoning_content", ""))
print("answer:", message.content)""",
    ),
    Sample(
        "Speak",
        """\
client.audio.speech.create(
    model="kokoro-82m", voice="af_heart", input="Good morning!", response_format="wav"
).write_to_file("speech.wav")""",
    ),
    Sample(
        "Transcribe",
        """\
heard = client.audio.transcriptions.create(model="whisper-tiny.en", file=open("speech.wav", "rb"))
print(heard.text)""",
    ),
    Sample(
        "Make an image",
        """\
import base64

made = client.images.generate(
    model="sd-turbo", prompt="A lighthouse at dusk", size="512x512", response_format="b64_json", extra_body={"seed": 7}
)
open("image.png", "wb").write(base64.b64decode(made.data[0].b64_json))""",
    ),
    Sample(
        "Make a video",
        """\
video = client.videos.create_and_poll(model="cogvideox-2b", prompt="A paper boat in the rain", seconds="2")
client.videos.download_content(video.id).write_to_file("video.mp4")""",
    ),
    Sample(
        "Embed",
        """\
made = client.embeddings.create(model="minilm-l6-v2", input=["The cat sleeps.", "A kitten naps."])
print(len(made.data), len(made.data[0].embedding))""",
    ),
)
