"""Hosts with sshd, for the tests of mode switches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from django.conf import settings

from tests.apps.fleet.modes.host import SshHost, make_model


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    make_model(models)
    return models


@pytest.fixture
def light() -> bool:
    """Whether the host's daemons compute by arithmetic, to be quick."""
    return False


@pytest.fixture
def host(tmp_path: Path, tiny_models: Path, light: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshHost]:
    """One host; its sshd and its daemons end with the test."""
    made = SshHost(tmp_path / "rack1", tiny_models, settings.ENV.daemon_token.get_secret_value(), light=light)
    changes = {"fleet_ssh_key": made.client_key, "models_dir": tiny_models}
    monkeypatch.setattr(settings, "ENV", settings.ENV.model_copy(update=changes))
    made.start()
    yield made
    made.end()
