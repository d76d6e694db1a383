"""One step's chunks as flat arrays, the same for every device."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_daemon.engine.picture import angles
from gpu_daemon.engine.sequence import Chunk


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows are the step's tokens, chunk after chunk; row i of `tables` are the cache blocks of chunk i's sequence."""

    tokens: np.ndarray  # i64 [rows]
    positions: np.ndarray  # i64 [rows]: place in the sequence
    angles: np.ndarray  # i64 [sections, rows]: place for rope
    row_table: np.ndarray  # i64 [rows]
    tables: np.ndarray  # i64 [chunks, blocks]
    runs: tuple[tuple[int, int], ...]  # (first row, rows) of each chunk
    sampled: np.ndarray  # i64 [samples]: rows whose logits are wanted
    pictured: tuple[tuple[int, Any], ...] = ()  # (first row, what stands there in place of the tokens' own embeddings)

    def flat(self) -> np.ndarray:
        """All of it in one i64 array, for another rank."""
        sizes = [len(self.tokens), len(self.angles), *self.tables.shape, len(self.sampled)]
        parts = [self.tokens, self.positions, self.angles, self.row_table, self.tables, np.array(self.runs), self.sampled]
        return np.concatenate([np.array(sizes), *(part.ravel() for part in parts)])

    @staticmethod
    def from_flat(numbers: np.ndarray) -> Batch:
        rows, sections, chunks, blocks, samples = numbers[:5].tolist()
        sizes = [rows, rows, sections * rows, rows, chunks * blocks, chunks * 2, samples]
        tokens, positions, angles, row_table, tables, runs, sampled = np.split(numbers[5:], np.cumsum(sizes)[:-1])
        return Batch(
            tokens=tokens,
            positions=positions,
            angles=angles.reshape(sections, rows),
            row_table=row_table,
            tables=tables.reshape(chunks, blocks),
            runs=tuple((first, count) for first, count in runs.reshape(chunks, 2).tolist()),
            sampled=sampled,
        )


def make_batch(chunks: Many[Chunk], sections: int = 1) -> Batch:
    counts = np.array([chunk.count for chunk in chunks])
    firsts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    positions = np.concatenate([np.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])
    tables = np.zeros((len(chunks), max(len(chunk.sequence.blocks) for chunk in chunks)), np.int64)
    for row, chunk in zip(tables, chunks, strict=True):
        row[: len(chunk.sequence.blocks)] = chunk.sequence.blocks
    return Batch(
        tokens=np.concatenate([chunk.sequence.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks]),
        positions=positions,
        angles=np.concatenate([_angles(chunk, sections) for chunk in chunks], 1),
        row_table=np.repeat(np.arange(len(chunks)), counts),
        tables=tables,
        runs=tuple(zip(firsts.tolist(), counts.tolist(), strict=True)),
        sampled=np.array(
            [first + chunk.count - 1 for first, chunk in zip(firsts, chunks, strict=True) if chunk.samples], np.int64
        ),
        pictured=tuple(seen for first, chunk in zip(firsts.tolist(), chunks, strict=True) for seen in _pictured(first, chunk)),
    )


def _angles(chunk: Chunk, sections: int) -> np.ndarray:
    if chunk.sequence.pictures:
        return angles(chunk.sequence.pictures, chunk.start, chunk.count)
    return np.broadcast_to(np.arange(chunk.start, chunk.end), (sections, chunk.count))


def _pictured(first: int, chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """Of each picture in a chunk that begins at row `first`, the rows that the chunk has."""
    for picture in chunk.pictures:
        begin, end = max(picture.start, chunk.start), min(picture.end, chunk.end)
        yield first + begin - chunk.start, picture.embedding[begin - picture.start : end - picture.start]
