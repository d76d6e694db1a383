"""Fixtures for every test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from apps.core.redis import connect
from apps.fleet.weights import pull
from tests.services import ROOT


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the tests: a file is one's, and so is all that drives the two stacks, which are started once."""
    for item in items:
        place = item.path.relative_to(ROOT)
        group = "e2e" if "e2e" in place.parts else str(place)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def redis_url() -> str:
    return os.environ["REDIS_URL"]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client on an empty database."""
    client = connect(redis_url)
    await client.flushdb()
    yield client
    await client.aclose()


def _pulled(model: str) -> Path:
    models = Path(os.environ["MODELS_DIR"])
    pull(model, models, lambda *_: None)
    return models / model


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """Where real weights are kept between runs."""
    return Path(os.environ["MODELS_DIR"])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real SmolLM2-135M-Instruct, fetched when it is not there."""
    return _pulled("smollm2-135m")


@pytest.fixture(scope="session")
def kokoro() -> Path:
    """The folder of the real Kokoro-82M with its 54 voices."""
    return _pulled("kokoro-82m")


@pytest.fixture(scope="session")
def whisper() -> Path:
    """The folder of the real Whisper tiny.en."""
    return _pulled("whisper-tiny.en")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    return _pulled("minilm-l6-v2")


@pytest.fixture(scope="session")
def django_db_keepdb() -> bool:
    """The test database is not dropped: its whole server goes away with its data."""
    return True
