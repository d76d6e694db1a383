"""Every field that the SDKs' own types document, an endpoint each, with what is sent to see what becomes of it. Data;
test_sdk_fields.py sends it, and holds the answers against what docs/api/ says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import (
    batch_create_params,
    completion_create_params,
    embedding_create_params,
    file_create_params,
    image_generate_params,
    video_create_params,
)
from openai.types.audio import speech_create_params, transcription_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_compact_params, response_create_params

from tests.pictures import picture

USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
CHAT_TOOL = {"tools": [{"type": "function", "function": TOOL}]}
RESPONSE_TOOL = {"tools": [{"type": "function", **TOOL}]}
MESSAGE_TOOL = {"tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]}
THINKER = {"model": "qwen3-14b"}
RECORDING = ("fox.wav", b"", "audio/wav")  # the test has the sound


def plain(**values: Any) -> dict[str, dict[str, Any]]:
    """Fields that make sense alone."""
    return {name: {name: value} for name, value in values.items()}


@dataclass(frozen=True)
class Endpoint:
    """`fields`: for each documented field what is sent beside the good body, which has the field and what it needs."""

    name: str
    page: str  # of docs/api/
    heading: str
    address: str
    documented: type
    good: dict[str, Any]
    fields: dict[str, dict[str, Any]]
    form: bool = False
    files: dict[str, tuple[str, bytes, str]] = field(default_factory=dict)
    sent_as_file: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


SAMPLED = plain(
    model="smollm2-135m", frequency_penalty=0.5, presence_penalty=0.5, logit_bias={"5": 1}, max_tokens=2, n=2, seed=7,
    stop=["x"], stream=True, temperature=0.5, top_p=0.9, user="u",
)  # fmt: skip
CHAT = Endpoint(
    "chat", "chat.md", "Request fields", "/v1/chat/completions", chat_create_params.CompletionCreateParamsStreaming,
    {"model": "smollm2-135m", "messages": [USER], "max_tokens": 1},
    {
        **SAMPLED,
        **plain(
            messages=[USER], audio={"format": "mp3", "voice": "alloy"}, function_call="auto", functions=[TOOL],
            logprobs=True, max_completion_tokens=2, metadata={"a": "b"}, modalities=["text"],
            moderation={"model": "omni-moderation-latest"}, prediction={"type": "content", "content": "x"},
            prompt_cache_key="k", prompt_cache_options={}, prompt_cache_retention="24h", response_format={"type": "text"},
            safety_identifier="s", service_tier="default", store=True, verbosity="low", web_search_options={},
        ),
        "parallel_tool_calls": {**CHAT_TOOL, "parallel_tool_calls": False},
        "reasoning_effort": {**THINKER, "reasoning_effort": "low"},
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
        "tool_choice": {**CHAT_TOOL, "tool_choice": "none"},
        "tools": CHAT_TOOL,
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    },
)  # fmt: skip
COMPLETIONS = Endpoint(
    "completions", "chat.md", "Request fields", "/v1/completions", completion_create_params.CompletionCreateParamsStreaming,
    {"model": "smollm2-135m", "prompt": "hi", "max_tokens": 1},
    {
        **SAMPLED,
        **plain(prompt="hi", best_of=2, echo=True, logprobs=2, suffix="x"),
        "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    },
)  # fmt: skip
TURN = plain(
    model="smollm2-135m", input="hi", instructions="Be short.", previous_response_id=None, prompt_cache_key="k",
    prompt_cache_options={}, prompt_cache_retention="24h",
)  # fmt: skip
RESPONSES = Endpoint(
    "responses", "responses.md", "Responses", "/v1/responses", response_create_params.ResponseCreateParamsStreaming,
    {"model": "smollm2-135m", "input": "hi", "max_output_tokens": 1},
    {
        **TURN,
        **plain(
            access_programs=[], background=True, background_options={}, context_management=[], conversation="c", image={},
            include=["message.output_text.logprobs"], max_output_tokens=2, max_tool_calls=2, metadata={"a": "b"},
            moderation={}, parallel_tool_calls=False, prompt={"id": "p"}, safety_identifier="s", service_tier="default",
            store=False, stream=True, temperature=0.5, text={"format": {"type": "text"}}, top_logprobs=2, top_p=0.9,
            truncation="disabled", user="u",
        ),
        "reasoning": {**THINKER, "reasoning": {"effort": "low"}},
        "stream_options": {"stream": True, "stream_options": {"include_obfuscation": False}},
        "tool_choice": {**RESPONSE_TOOL, "tool_choice": "none"},
        "tools": RESPONSE_TOOL,
    },
)  # fmt: skip
INPUT_TOKENS = Endpoint(
    "input tokens", "responses.md", "Responses", "/v1/responses/input_tokens",
    input_token_count_params.InputTokenCountParams,
    {"model": "smollm2-135m", "input": "hi"},
    {
        **{name: TURN[name] for name in ("model", "input", "instructions", "previous_response_id")},
        **{name: RESPONSES.fields[name] for name in ("conversation", "parallel_tool_calls", "reasoning", "text",
                                                     "tool_choice", "tools", "truncation")},
        "personality": {"personality": "kind"},
    },
)  # fmt: skip
COMPACT = Endpoint(
    "compact", "responses.md", "Compaction", "/v1/responses/compact", response_compact_params.ResponseCompactParams,
    {"model": "smollm2-135m", "input": "hi"},
    {**TURN, "image": {"image": {}}, "service_tier": {"service_tier": "default"}},
)  # fmt: skip
PROMPT = {
    **plain(
        model="smollm2-135m", messages=[USER], cache_control={"type": "ephemeral"}, speed="fast", system="Be short.",
        user_profile_id="u", workspace_id="w",
    ),
    "output_config": {**THINKER, "output_config": {"effort": "low"}},
    "thinking": {**THINKER, "thinking": {"type": "disabled"}},
    "tool_choice": {**MESSAGE_TOOL, "tool_choice": {"type": "none"}},
    "tools": MESSAGE_TOOL,
}  # fmt: skip
MESSAGES = Endpoint(
    "messages", "messages.md", "Messages", "/v1/messages", message_create_params.MessageCreateParamsStreaming,
    {"model": "smollm2-135m", "messages": [USER], "max_tokens": 1},
    {
        **PROMPT,
        **plain(
            max_tokens=2, container="c", diagnostics={}, inference_geo="eu", metadata={"user_id": "u"}, service_tier="auto",
            stop_sequences=["x"], stream=True,
        ),
    },
)  # fmt: skip
COUNT_TOKENS = Endpoint(
    "count tokens", "messages.md", "Messages", "/v1/messages/count_tokens",
    message_count_tokens_params.MessageCountTokensParams, {"model": "smollm2-135m", "messages": [USER]}, PROMPT,
)  # fmt: skip
SPEECH = Endpoint(
    "speech", "speech.md", "Speech", "/v1/audio/speech", speech_create_params.SpeechCreateParams,
    {"model": "kokoro-82m", "input": "Hi.", "voice": "af_heart", "response_format": "pcm"},
    plain(model="kokoro-82m", input="Hi.", voice="alloy", instructions="Be kind.", response_format="opus", speed=1.5,
          stream_format="sse"),
)  # fmt: skip
TRANSCRIPTIONS = Endpoint(
    "transcriptions", "speech.md", "Transcriptions", "/v1/audio/transcriptions",
    transcription_create_params.TranscriptionCreateParamsStreaming, {"model": "whisper-tiny.en"},
    {
        **plain(
            file=RECORDING, model="whisper-tiny.en", chunking_strategy="auto", language="en", prompt="A fox.",
            response_format="text", stream="true", temperature="0.2", keywords="fox",
        ),
        "include": {"include[]": "logprobs"},
        "languages": {"languages[]": "en"},
        "known_speaker_names": {"known_speaker_names[]": "Ann"},
        "known_speaker_references": {"known_speaker_references[]": "data:audio/wav;base64,AAAA"},
        "timestamp_granularities": {"response_format": "verbose_json", "timestamp_granularities[]": "segment"},
    },
    form=True, files={"file": RECORDING}, sent_as_file=frozenset({"file"}),
)  # fmt: skip
EMBEDDINGS = Endpoint(
    "embeddings", "embeddings.md", "Embeddings", "/v1/embeddings", embedding_create_params.EmbeddingCreateParams,
    {"model": "minilm-l6-v2", "input": "hi"},
    plain(model="minilm-l6-v2", input=["a", "b"], dimensions=64, encoding_format="base64", user="u"),
)  # fmt: skip
IMAGES = Endpoint(
    "images", "images.md", "Images", "/v1/images/generations", image_generate_params.ImageGenerateParamsStreaming,
    {"model": "sd-turbo", "prompt": "a fox", "size": "64x64"},
    {
        **plain(
            model="sd-turbo", prompt="a fox", background="opaque", complexity="low", frame_count=2, frame_duration_ms=100,
            moderation="low", n=2, output_format="webp", quality="medium", response_format="b64_json",
            safety_identifier="s", size="128x64", stream=True, style="vivid", svg={}, user="u",
        ),
        "output_compression": {"output_format": "jpeg", "output_compression": 50},
        "partial_images": {"stream": True, "partial_images": 1},
    },
)  # fmt: skip
VIDEOS = Endpoint(
    "videos", "videos.md", "Videos", "/v1/videos", video_create_params.VideoCreateParams,
    {"model": "cogvideox-2b", "prompt": "a fox", "size": "64x64", "seconds": "1", "steps": "1"},
    plain(model="cogvideox-2b", prompt="a fox", seconds="2", size="80x64",
          input_reference=("fox.png", picture(), "image/png")),
    form=True, sent_as_file=frozenset({"input_reference"}),
)  # fmt: skip
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "minilm-l6-v2", "input": "hi"}}
FILES = Endpoint(
    "files", "batches.md", "Files", "/v1/files", file_create_params.FileCreateParams, {"purpose": "batch"},
    {
        **plain(file=("lines.jsonl", json.dumps(LINE).encode(), "application/jsonl"), purpose="user_data"),
        "expires_after": {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
    },
    form=True, files={"file": ("lines.jsonl", json.dumps(LINE).encode(), "application/jsonl")},
    sent_as_file=frozenset({"file"}),
)  # fmt: skip
BATCHES = Endpoint(
    "batches", "batches.md", "Batches", "/v1/batches", batch_create_params.BatchCreateParams,
    {"completion_window": "24h", "endpoint": "/v1/embeddings", "input_file_id": "(uploaded by the test)"},
    plain(completion_window="24h", endpoint="/v1/embeddings", input_file_id="(uploaded by the test)", metadata={"a": "b"},
          output_expires_after={"anchor": "created_at", "seconds": 3600}),
)  # fmt: skip
ENDPOINTS = [
    CHAT, COMPLETIONS, RESPONSES, INPUT_TOKENS, COMPACT, MESSAGES, COUNT_TOKENS, SPEECH, TRANSCRIPTIONS, EMBEDDINGS, IMAGES,
    VIDEOS, FILES, BATCHES,
]  # fmt: skip
