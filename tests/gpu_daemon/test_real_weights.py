"""Real weights out of packages do what they were trained for: one model's speech is what the other hears."""

from __future__ import annotations

import json
import math

import av
import pytest
import torch
import transformers
from safetensors import safe_open

from gpu_daemon.convert_kokoro import CONFIG_SHA256
from gpu_daemon.onnx_file import read_graph
from gpu_daemon.runners import kokoro_model
from gpu_daemon.runners.convert_whisper import model_name
from tests.services import ROOT

PHONEMES = "ðɪs ɪz ɐ tˈɛst."  # noqa: RUF001


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # more only wait for each other where the cores are shared


def test_what_kokoro_says_is_what_whisper_hears(kokoro, whisper) -> None:
    model = kokoro_model.load(kokoro)
    with safe_open(kokoro / "voices.safetensors", "pt") as voices:
        assert len(list(voices.keys())) == 54
        voice = voices.get_tensor("af_heart")
    assert voice.shape == (510, 1, 256)
    with torch.no_grad():
        audio = model(PHONEMES, voice[len(PHONEMES) - 1])
    assert _heard(whisper, audio) == "This is a test."


def _heard(folder, audio: torch.Tensor) -> str:
    """What Whisper makes of 24 kHz audio [samples]."""
    frame = av.AudioFrame.from_ndarray(audio.numpy()[None], format="flt", layout="mono")
    frame.sample_rate = 24_000
    resampler = av.AudioResampler("flt", "mono", 16_000)
    samples = [torch.from_numpy(out.to_ndarray()[0]) for given in (frame, None) for out in resampler.resample(given)]
    listener = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    features = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    heard = features(torch.cat(samples).numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    return tokenizer.decode(listener.generate(heard)[0], skip_special_tokens=True).strip()


def test_whisper_s_words_are_gpt_2_s_and_its_own(whisper) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(whisper)
    assert tokenizer("Hello world, this is", add_special_tokens=False)["input_ids"] == [15496, 995, 11, 428, 318]
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "<|30.00|>"])
    assert ids == [50256, 50257, 50362, 51863]
    generation = json.loads((whisper / "generation_config.json").read_text())
    assert generation["suppress_tokens"][:10] == [1, 2, 7, 8, 9, 10, 14, 25, 26, 27]
    assert model_name("decoder.blocks.0.cross_attn.query.weight") == "model.decoder.layers.0.encoder_attn.q_proj.weight"


def test_minilm_finds_what_is_alike(minilm) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm)
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The central bank raised its rates."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    alike, apart = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert alike > 0.6 > 0.2 > apart


def test_kokoro_s_config_is_the_official_one(kokoro) -> None:
    import hashlib

    assert hashlib.sha256((kokoro / "config.json").read_bytes()).hexdigest() == CONFIG_SHA256
    tiny = json.loads((ROOT / "fixtures" / "tiny" / "kokoro-82m.json").read_text())["config"]
    assert tiny["vocab"] == json.loads((kokoro / "config.json").read_text())["vocab"]
    with safe_open(kokoro / "model.safetensors", "pt") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    assert sum(math.prod(shape) for shape in shapes) == 81_810_022 - 768 * 769  # all but the pooler


@pytest.mark.parametrize("data", [b"", b"\x3a\x05ab", b"\xff" * 30, b"\x0f", b"\x3a\x04\x2a\x02\x10\x63"])
def test_what_is_no_onnx_file_is_said(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"ONNX|protobuf|cut short|unknown type"):
        read_graph(memoryview(data))
