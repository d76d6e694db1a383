"""Embeddings on a tiny encoder and on the real MiniLM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from gpu_daemon.engine.task import EmbedWork, SpeechWork, Task
from gpu_daemon.errors import InvalidCommand, LoadFailed
from gpu_daemon.runners.embedding import EmbeddingRunner
from gpu_daemon.runners.torch_runner import RunnerOptions, set_threads
from tests.gpu_daemon.task_driver import make_task, run_all, run_step

VOCAB, HIDDEN = 200, 48


@pytest.fixture
def folder(tmp_path) -> Path:
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> EmbeddingRunner:
    set_threads(1)
    return EmbeddingRunner.load(folder, RunnerOptions("cpu", 512), lambda *_: None)


def task(ids, dimensions: int = 0) -> Task:
    return make_task(EmbedWork(tuple(ids), dimensions), 1)


def vector(told) -> np.ndarray:
    (progress,) = told
    assert progress.finished
    assert progress.units == 1
    assert progress.mime == "application/octet-stream"
    return np.frombuffer(progress.media, "<f4")


def texts(lengths) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(1, VOCAB, length).tolist() for length in lengths]


def test_a_vector_is_the_mean_of_its_tokens(folder) -> None:
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    (ids,) = texts([17])
    with torch.inference_mode():
        mean = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    (told,) = run_all(load(folder), [task(ids)])
    np.testing.assert_allclose(vector(told), (mean / mean.norm()).numpy(), atol=1e-5)


def test_a_crowd_is_as_each_alone_whatever_the_lengths(folder) -> None:
    runner = load(folder)
    many = texts([1, 512, 3, 300, 20, 512, 2, 511, 40, 512, 512, 512, 512, 512, 512, 512])
    told = run_step(runner, tasks := [task(ids) for ids in many])
    assert len(told) == len(many), "one step is enough for all"
    for ids, each in zip(many, tasks, strict=True):
        (alone,) = run_all(runner, [task(ids)])
        np.testing.assert_allclose(vector([told[each]]), vector(alone), atol=1e-5)


def test_fewer_dimensions_are_normalised_again(folder) -> None:
    runner = load(folder)
    (ids,) = texts([9])
    whole, cut = (vector(told) for told in run_all(runner, [task(ids), task(ids, 10)]))
    assert whole.shape == (HIDDEN,)
    np.testing.assert_allclose(np.linalg.norm(whole), 1, rtol=1e-5)
    np.testing.assert_allclose(cut, whole[:10] / np.linalg.norm(whole[:10]), rtol=1e-5)


@pytest.mark.parametrize(
    "work",
    [
        EmbedWork(()),
        EmbedWork((1,) * 513),
        EmbedWork((VOCAB,)),
        EmbedWork((-1,)),
        EmbedWork((1,), HIDDEN + 1),
        EmbedWork((1,), -1),
        SpeechWork("Hello", "af_heart"),
    ],
)
def test_refuses_what_it_cannot_do(folder, work) -> None:
    runner = load(folder)
    runner.check(EmbedWork((1,) * 512, HIDDEN))
    with pytest.raises(InvalidCommand):
        runner.check(work)


def test_a_text_is_no_longer_than_the_encoder_was_trained_on(folder) -> None:
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    runner = load(folder)
    runner.check(EmbedWork((1,) * 256))
    with pytest.raises(InvalidCommand, match="1 to 256 tokens, not 257"):
        runner.check(EmbedWork((1,) * 257))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sentence_bert_config.json"])
def test_a_damaged_folder_is_refused(folder, name) -> None:
    (folder / name).write_text("[")
    with pytest.raises(LoadFailed, match=folder.name):
        load(folder)


def test_warm_measures(folder) -> None:
    runner = load(folder)
    runner.warm()
    assert runner.input_ms_per_unit > 0


def test_real_vectors_know_what_is_alike(minilm) -> None:
    runner = load(minilm)
    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    sentences = ["A cat sits on the mat.", "There is a kitten on the rug.", "The stock market fell sharply."]
    cat, kitten, market = (vector(told) for told in run_all(runner, [task(tokenizer.encode(s).ids) for s in sentences]))
    assert cat.shape == (384,)
    assert cat @ kitten > 0.5 > 0.2 > cat @ market
