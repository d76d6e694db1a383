"""Speech on a tiny Kokoro and on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from gpu_daemon.engine.task import EmbedWork, SpeechWork, Task, TranscribeWork
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.runners import kokoro_model
from gpu_daemon.runners.kokoro_voice import PHONEMES, SAMPLE_RATE, Utterance, _Seeded, fuse, speak
from gpu_daemon.runners.phonemes import LANGUAGES, Phonemes
from gpu_daemon.runners.speech import SpeechRunner
from gpu_daemon.runners.tiny.speech import make_speech
from gpu_daemon.runners.torch_runner import RunnerOptions, set_threads
from gpu_daemon.runners.transcription import TranscriptionRunner
from tests.gpu_daemon.task_driver import make_task, run_all, run_step

RECIPE = json.loads((Path(__file__).parents[2] / "fixtures/tiny/kokoro-82m.json").read_text())
LONG = "It was a bright cold day. " * 14
TEXTS = ["Hello, world!", "The quick brown fox jumps over the lazy dog. " * 3, "Why?", LONG[:200]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("kokoro")
    torch.manual_seed(0)
    make_speech(RECIPE, target)
    return target


def load(folder: Path) -> SpeechRunner:
    set_threads(1)
    return SpeechRunner.load(folder, RunnerOptions("cpu", 512), lambda *_: None)


@pytest.fixture(scope="module")
def tiny(folder) -> SpeechRunner:
    return load(folder)


def task(text: str, voice: str = "af_heart", *, speed: float = 2.0, done: int = 0) -> Task:
    return make_task(SpeechWork(text, voice, speed), len(text), done=done)


def sound(told) -> np.ndarray:
    return np.frombuffer(b"".join(progress.media for progress in told), "<i2").astype(np.float32) / 32767


def say(runner: SpeechRunner, *tasks: Task) -> list[np.ndarray]:
    return [sound(told) for told in run_all(runner, list(tasks))]


def test_a_batch_speaks_as_the_official_model_does_alone(folder) -> None:
    model = kokoro_model.load(folder)
    random = torch.Generator().manual_seed(1)
    batch = []
    for length, speed in ((20, 1.0), (7, 0.5), (33, 2.0), (PHONEMES, 4.0)):
        ids = torch.randint(1, 170, (length,), generator=random).tolist()
        batch.append(Utterance([0, *ids, 0], torch.randn(256, generator=random), speed, seed=length))
    official = []
    for utterance in batch:
        with _Seeded(utterance.seed, torch.device("cpu")):
            ids = torch.tensor([utterance.ids])
            official.append(model.forward_with_tokens(ids, utterance.style[None], utterance.speed)[0])
    for spoken, alone in zip(speak(fuse(model), batch), official, strict=True):
        torch.testing.assert_close(spoken, alone, atol=1e-4, rtol=0)


def test_a_crowd_speaks_as_each_alone(tiny) -> None:
    voices = ["af_heart", "bm_george", "ef_dora", "af_heart,af_bella"]
    alone = [say(tiny, task(text, voice))[0] for text, voice in zip(TEXTS, voices, strict=True)]
    together = say(tiny, *(task(text, voice) for text, voice in zip(TEXTS, voices, strict=True)))
    for crowd, single in zip(together, alone, strict=True):
        assert len(crowd) == len(single)
        assert np.abs(crowd - single).max() < 1e-3


def test_the_same_text_has_the_same_sound_again(tiny) -> None:
    torch.manual_seed(1)
    first = say(tiny, task(TEXTS[1]))[0]
    torch.manual_seed(2)
    assert np.array_equal(first, say(tiny, task(TEXTS[1]))[0])
    other = say(tiny, task(TEXTS[1], "am_adam"))[0]
    assert len(other) != len(first) or not np.allclose(other, first, atol=0.01)


def test_shares_add_up_and_the_first_is_short(tiny) -> None:
    told = run_all(tiny, [task(LONG)])[0]
    assert len(told[0].media) * 4 < sum(len(progress.media) for progress in told)
    assert sum(progress.units for progress in told) == len(LONG)
    assert told[0].units <= 60
    assert all(progress.media and progress.mime == "audio/pcm" for progress in told)
    assert [progress.finished for progress in told] == [False] * (len(told) - 1) + [True]


def test_another_attempt_goes_on_where_the_first_one_was(tiny) -> None:
    told = run_all(tiny, [task(LONG)])[0]
    rest = run_all(tiny, [task(LONG, done=told[0].units + told[1].units)])[0]
    assert np.array_equal(sound(rest), sound(told[2:]))


def test_who_has_said_nothing_goes_first(tiny) -> None:
    speaking, new = task(LONG), task(LONG)
    run_step(tiny, [speaking])
    assert set(run_step(tiny, [speaking, new])) == {new}
    assert set(run_step(tiny, [speaking, new])) == {speaking, new}


def test_speed_and_mixed_voices(tiny) -> None:
    slow, normal, fast = say(tiny, *(task(TEXTS[1], speed=speed) for speed in (0.5, 1.0, 2.0)))
    assert len(slow) > len(normal) > len(fast)
    heart, bella, mixed = say(tiny, *(task("Hello there.", voice) for voice in ("af_heart", "af_bella", "af_heart,af_bella")))
    assert mixed.tobytes() not in (heart.tobytes(), bella.tobytes())


@pytest.mark.parametrize(
    "text",
    [
        "9" * 120,  # many phonemes for few characters
        "[x](/" + "ə" * 700 + "/) and more",
        "🙂 日本語 ﷽ \x00 ½ % İ",
        "Hello.   \n\n \n " + " " * 300,
        "   " + "a" * 100,
        "Hello. " + "-" * 300,
    ],
)
def test_any_text_is_spoken_to_its_end(tiny, text) -> None:
    tiny.check(SpeechWork(text, "af_heart"))
    told = run_all(tiny, [task(text)])[0]
    assert sum(progress.units for progress in told) == len(text)
    assert np.abs(sound(told)).max() > 0


def test_what_has_no_sound_is_a_short_silence(tiny) -> None:
    told = run_all(tiny, [task("Hello there, everyone who is here to listen to us today.\n" + "\u200b" * 20)])[0]
    assert not np.any(sound(told[-1:]))
    assert 0 < len(told[-1].media) <= SAMPLE_RATE


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (SpeechWork("", "af_heart"), "nothing in it to say"),
        (SpeechWork(" ... —!\n", "af_heart"), "nothing in it to say"),
        (SpeechWork("Hello", "nobody"), "no voice 'nobody'"),
        (SpeechWork("Hello", ""), "no voice ''"),
        (SpeechWork("Hello", "af_heart,"), "no voice ''"),
        (SpeechWork("Hello", "jf_alpha"), "jf_alpha speaks Japanese that is not installed"),
        (SpeechWork("Hello", "af_heart,zm_yunxi"), "zm_yunxi speaks Chinese"),
        (SpeechWork("Hello", "af_heart", 0.2), "speed"),
        (SpeechWork("Hello", "af_heart", float("nan")), "speed"),
        (EmbedWork((1,)), "nothing else"),
    ],
)
def test_refuses_what_it_cannot_do(tiny, work, reason) -> None:
    with pytest.raises(InvalidCommand, match=reason):
        tiny.check(work)


def test_names_the_voices_it_has(tiny) -> None:
    assert len(tiny.voices) == 41
    assert not [name for name in tiny.voices if name[0] in "jz"]


def test_every_language_has_phonemes() -> None:
    phonemes = Phonemes(set(LANGUAGES))
    assert phonemes("a", "A bath.") != phonemes("b", "A bath.")
    assert len({phonemes(letter, "no 1 animal") for letter in LANGUAGES}) == len(LANGUAGES)
    assert phonemes("a", "9" * 400).count("In") > 9, "a number that only espeak reads"


def test_warm_measures(tiny) -> None:
    tiny.warm()
    assert tiny.output_ms_per_unit > 0


def damaged(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "voices.safetensors"])
def test_a_damaged_folder_is_refused(folder, tmp_path, name) -> None:
    (damaged(folder, tmp_path) / name).write_text("{}")
    with pytest.raises(LoadFailed, match=tmp_path.name):
        load(tmp_path)


@pytest.mark.parametrize("voices", [{"jf_alpha": (510, 1, 256)}, {"af_heart": (510, 256)}])
def test_voices_of_no_use_are_refused(folder, tmp_path, voices) -> None:
    target = damaged(folder, tmp_path) / "voices.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in voices.items()}, target)
    with pytest.raises(LoadFailed, match="voice"):
        load(tmp_path)


def test_weights_of_another_model_are_refused(folder, tmp_path) -> None:
    target = damaged(folder, tmp_path) / "model.safetensors"
    state = load_file(target)
    del state["bert_encoder.weight"]
    save_file(state, target)
    with pytest.raises(LoadFailed):
        load(tmp_path)


# --- The real one ---


def test_what_it_says_is_understood(kokoro, whisper) -> None:
    """Kokoro speaks two sentences, and Whisper writes them down."""
    text = "The quick brown fox jumps over the lazy dog. It paid twelve dollars for that."
    (spoken,) = say(load(kokoro), task(text, speed=1.0))
    assert 3 < len(spoken) / SAMPLE_RATE < 10
    times = np.arange(0, len(spoken), SAMPLE_RATE / 16000)
    audio = (np.interp(times, np.arange(len(spoken)), spoken) * 32767).astype("<i2").tobytes()
    listener = TranscriptionRunner.load(whisper, RunnerOptions("cpu", 448), lambda *_: None)
    (told,) = run_all(listener, [make_task(TranscribeWork(audio), 200)])
    tokenizer = Tokenizer.from_file(str(whisper / "tokenizer.json"))
    heard = tokenizer.decode([token for progress in told for token in progress.token_ids])
    assert heard.strip().lower() == "the quick brown fox jumps over the lazy dog. it paid $12 for that."
