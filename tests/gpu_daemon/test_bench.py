"""The benchmarks run, and say what they measured."""

from __future__ import annotations

import re

import pytest

from gpu_daemon.bench import main


@pytest.fixture
def bench(capsys):
    def run(model: str) -> str:
        main(["--model", model, "--tiny", "--device", "cpu", "--threads", "1"])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("model", ["smollm2-135m", "qwen3-14b"])
def test_a_model_of_text_goes_through_every_measure(bench, model: str) -> None:
    printed = bench(model)
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.M)
    assert [int(row[0]) for row in rows] == [1, 8]
    assert all(float(value) > 0 for row in rows for value in row)
    assert re.search(r"floor [\d.]+ +\d+%", printed)
    assert re.search(r"restore \d+ ms +compute \d+ ms", printed)
    assert peak_of(printed) > 0


def test_a_picture_is_answered_alone_and_beside_streams(bench) -> None:
    printed = bench("qwen2.5-vl-3b")
    assert "16 tokens" in printed
    assert len(re.findall(r"(?:first token|seen lately|first) +[1-9]\d* ms", printed)) == 3
    assert peak_of(printed) > 0


def test_speech_has_a_real_time_factor_and_a_first_sound(bench) -> None:
    printed = bench("kokoro-82m")
    factors = re.findall(r"(?:first piece|whole text) +[\d.]+ s +([\d.]+) s of sound +factor ([\d.]+)", printed)
    assert all(float(value) > 0 for row in factors for value in row)
    assert len(factors) == 2
    assert re.search(r"[\d.]+x later", printed)
    assert peak_of(printed) > 0


@pytest.mark.parametrize(("model", "batches"), [("sd-turbo", [1, 8]), ("cogvideox-2b", [1])])
def test_a_pipeline_is_measured(bench, model: str, batches: list[int]) -> None:
    rows = re.findall(r"^ +(\d+)((?: +[\d.]+){4}) +([\d.]+) s +([\d.]+)$", bench(model), re.M)
    assert [int(row[0]) for row in rows] == batches
    assert all(float(value) > 0 for row in rows for value in [*row[1].split(), *row[2:]])


def peak_of(printed: str) -> float:
    return float(re.findall(r"peak memory +([\d.]+) GiB", printed)[0])
