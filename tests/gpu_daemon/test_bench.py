"""The engine's benchmark runs, and says what it measured."""

from __future__ import annotations

import re

import pytest

from gpu_daemon.bench import main


def test_a_tiny_model_goes_through_every_measure(capsys) -> None:
    main(["--model", "tiny", "--quick", "--device", "cpu", "--kv-gib", "0.2"])
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", printed, re.M)
    assert [int(row[0]) for row in rows] == [1, 8]
    assert all(float(value) > 0 for row in rows for value in row)
    assert re.search(r"floor [\d.]+ +\d+%", printed)
    assert re.search(r"restore \d+ ms +compute \d+ ms", printed)


@pytest.mark.parametrize(("model", "batches"), [("sd-turbo", [1, 8]), ("cogvideox-2b", [1])])
def test_a_tiny_pipeline_is_measured(capsys, model, batches) -> None:
    main(["--model", model, "--tiny", "--device", "cpu"])
    rows = re.findall(r"^ +(\d+)((?: +[\d.]+){4}) +([\d.]+) s +([\d.]+)$", capsys.readouterr().out, re.M)
    assert [int(row[0]) for row in rows] == batches
    assert all(float(value) > 0 for row in rows for value in [*row[1].split(), *row[2:]])
