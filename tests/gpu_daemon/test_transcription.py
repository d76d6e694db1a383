"""Transcription against `model.generate` of the same model, and against itself: alone, in a crowd, again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gpu_daemon.engine.task import EmbedWork, Task, TranscribeWork
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.runners.torch_runner import RunnerOptions, set_threads
from gpu_daemon.runners.transcription import TranscriptionRunner
from gpu_daemon.runners.windows import cut_windows
from tests.gpu_daemon.task_driver import make_task, run_all, run_step

RATE = 16000
END, START, BEFORE, NO_STAMPS = 100, 101, 102, 103
VOCAB = NO_STAMPS + 1 + 1501


def make_whisper(folder: Path, **generation) -> Path:
    """A seeded checkpoint. Its weights are large, so that what is said depends on what is heard."""
    torch.manual_seed(1)
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, eos_token_id=END, bos_token_id=END, pad_token_id=END,
        decoder_start_token_id=START, init_std=0.4, suppress_tokens=[], begin_suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=END, bos_token_id=END, pad_token_id=END, decoder_start_token_id=START, no_timestamps_token_id=NO_STAMPS,
        prev_sot_token_id=BEFORE, is_multilingual=False, suppress_tokens=[1, 2, BEFORE], begin_suppress_tokens=[5, END],
        max_initial_timestamp_index=50, max_length=448, **generation,
    )  # fmt: skip
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TranscriptionRunner:
    return load(make_whisper(tmp_path_factory.mktemp("whisper")))


def load(folder: Path) -> TranscriptionRunner:
    set_threads(1)
    return TranscriptionRunner.load(folder, RunnerOptions("cpu", 448), lambda *_: None)


def noise(seconds: float, seed: int = 0) -> bytes:
    """Tones that come and go, and some noise."""
    random = np.random.default_rng(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    tones = np.sin(2 * np.pi * (200 + 100 * seed) * times * (1 + np.floor(times * 3) % 4))
    return (3000 * tones + 1000 * random.standard_normal(len(times))).astype("<i2").tobytes()


def task(audio: bytes, *, units: int = 2000, done: int = 0, **options) -> Task:
    return make_task(TranscribeWork(audio, **options), units, done=done)


def tokens(told) -> list[int]:
    assert all(progress.units == len(progress.token_ids) for progress in told)
    return [token for progress in told for token in progress.token_ids]


def generate(folder: Path, audio: bytes, timestamps: bool) -> list[int]:
    """What `model.generate` makes of one window, its start and end cut off. Not Whisper's own `generate` but the one below it:
    that one's goes on from the last timestamp, in the same window."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder)
    sound = np.frombuffer(audio, "<i2").astype(np.float32) / 32768
    features = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
    config = model.generation_config
    start = [START] if timestamps else [START, NO_STAMPS]
    rules = [
        transformers.SuppressTokensLogitsProcessor(config.suppress_tokens),
        transformers.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, len(start)),
    ]
    if timestamps:
        rules.append(transformers.WhisperTimeStampLogitsProcessor(config, begin_index=len(start)))
    config.suppress_tokens = config.begin_suppress_tokens = config.max_length = None
    said = transformers.GenerationMixin.generate(
        model, features, decoder_input_ids=torch.tensor([start]), logits_processor=rules, max_new_tokens=224
    )[0].tolist()
    return [token for token in said[len(start) :] if token != END]


@pytest.mark.parametrize("timestamps", [False, True])
def test_says_what_generate_says(tiny, tmp_path, timestamps) -> None:
    folder = make_whisper(tmp_path)
    for seed in range(2):
        audio = noise(4 + seed, seed)
        said = tokens(run_all(tiny, [task(audio, timestamps=timestamps)])[0])
        assert said
        assert said == generate(folder, audio, timestamps)


def test_a_crowd_says_what_each_says_alone(tiny) -> None:
    """They come at different times, so that prompts, first and later tokens meet in one step."""
    options = [{}, {"timestamps": True}, {"prompt_ids": (7, 8, 9)}, {"temperature": 0.7, "seed": 5}]
    works = [TranscribeWork(noise(3, seed), **given) for seed, given in enumerate(options)]
    alone = [tokens(run_all(tiny, [make_task(work, 40)])[0]) for work in works]
    assert len({tuple(said) for said in alone}) == len(works)
    tasks = [make_task(work, 40) for work in works]
    early = [run_step(tiny, tasks[: i + 1]) for i in range(len(tasks))]
    late = run_all(tiny, [task for task in tasks if task.done < 40])
    for work_alone, task in zip(alone, tasks, strict=True):
        told = [step[task] for step in early if task in step]
        told += next((part for part in late if part[0].task is task), [])
        assert tokens(told) == work_alone


def test_seeds_decide_what_is_drawn(tiny) -> None:
    said = [tokens(run_all(tiny, [task(noise(3), units=30, temperature=1.0, seed=seed)])[0]) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_another_attempt_tells_only_what_was_not_told(tiny) -> None:
    whole = tokens(run_all(tiny, [task(noise(3), units=50)])[0])
    rest = run_all(tiny, [task(noise(3), units=50, done=21)])[0]
    assert tokens(rest) == whole[21:]


def test_a_long_sound_is_heard_to_its_end(tiny) -> None:
    """Each window says what it says by itself, and where the next one begins."""
    sound = np.frombuffer(noise(70, 1), "<i2").copy()
    quiet = [(27 * RATE, 28 * RATE), (54 * RATE, 55 * RATE)]
    for start, end in quiet:
        sound[start:end] = 0
    cuts = np.cumsum([len(window) for window in cut_windows(sound.astype(np.float32), rate=RATE, seconds=30)])[:-1]
    assert all(start < cut < end for cut, (start, end) in zip(cuts, quiet, strict=True))
    said = tokens(run_all(tiny, [task(sound.tobytes(), timestamps=True)])[0])
    expected: list[int] = []
    for window in np.split(sound, cuts):
        expected += tokens(run_all(tiny, [task(window.tobytes(), timestamps=True)])[0])
        expected += [NO_STAMPS + 1 + round(len(window) / RATE * 50), END]
    expected = expected[:-2]  # nothing follows the last
    assert said == expected


def test_sound_is_cut_where_it_is_quiet_and_nothing_is_lost() -> None:
    sound = np.random.default_rng(0).standard_normal(100 * RATE).astype(np.float32)
    windows = cut_windows(sound, rate=RATE, seconds=30)
    assert np.array_equal(np.concatenate(windows), sound)
    assert all(25 * RATE <= len(window) <= 30 * RATE for window in windows[:-1])
    assert len(cut_windows(sound[: 30 * RATE], rate=RATE, seconds=30)) == 1


def test_no_more_is_told_than_there_are_units(tiny) -> None:
    told = run_all(tiny, [task(noise(70), units=21)])[0]
    assert len(tokens(told)) == 21
    assert told[-1].finished


def test_a_dropped_task_leaves_nothing(tiny) -> None:
    dropped, other = task(noise(3)), task(noise(3, 1), units=30)
    run_step(tiny, [dropped, other])
    tiny.drop(dropped)
    tiny.drop(dropped)
    run_all(tiny, [other])
    assert not tiny._transcripts


@pytest.mark.parametrize(
    "work",
    [
        TranscribeWork(b""),
        TranscribeWork(b"\x00"),
        TranscribeWork(noise(1), language="de"),
        TranscribeWork(noise(1), prompt_ids=(END,)),
        TranscribeWork(noise(1), prompt_ids=(-1,)),
        TranscribeWork(noise(1), temperature=float("nan")),
        EmbedWork((1,)),
    ],
)
def test_refuses_what_it_cannot_do(tiny, work) -> None:
    with pytest.raises(InvalidCommand):
        tiny.check(work)


def test_takes_what_it_can_do(tiny) -> None:
    tiny.check(TranscribeWork(b"\x00\x00", prompt_ids=(0, END - 1), temperature=1.0))
    assert tokens(run_all(tiny, [task(b"\x00\x00", units=10)])[0])


def test_warm_measures(tiny) -> None:
    tiny.warm()
    assert tiny.input_ms_per_unit > 0
    assert tiny.output_ms_per_unit > 0


@pytest.mark.parametrize("damage", ["model.safetensors", "preprocessor_config.json", "config.json"])
def test_a_damaged_folder_is_refused(tmp_path, damage) -> None:
    folder = make_whisper(tmp_path)
    (folder / damage).write_text("{")
    with pytest.raises(LoadFailed, match=tmp_path.name):
        load(folder)


def test_a_folder_that_lacks_a_weight_is_refused(tmp_path) -> None:
    folder = make_whisper(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.decoder.layers.0.fc1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadFailed, match=r"not those of its config\.json"):
        load(folder)
