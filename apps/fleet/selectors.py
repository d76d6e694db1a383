"""Reads of the fleet's record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from datetime import time as clock
from pathlib import Path

from django.conf import settings

from apps.fleet.models import Model

CACHE_SECONDS = 4.0
TINY_MARK = "tiny.json"  # in the folder of a seeded checkpoint that has the architecture and not the weights
_cache: tuple[float, dict[str, ModelCard]] = (0.0, {})


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A catalogued model as others need to know it. `created` is seconds since the epoch."""

    name: str
    title: str
    modality: str
    owned_by: str
    context_length: int
    parameters: int
    thinking: bool
    created: int

    @property
    def folder(self) -> Path:
        return settings.ENV.models_dir / self.name

    @property
    def has_weights(self) -> bool:
        return (self.folder / "config.json").is_file()

    @property
    def tiny(self) -> bool:
        return (self.folder / TINY_MARK).is_file()


async def model_cards() -> dict[str, ModelCard]:
    """The enabled models by name, read from Postgres at most every 4 s."""
    global _cache
    until, cards = _cache
    if time.monotonic() >= until:
        cards = {m.name: _card(m) async for m in Model.objects.filter(is_enabled=True)}
        _cache = (time.monotonic() + CACHE_SECONDS, cards)
    return cards


def _card(model: Model) -> ModelCard:
    created = datetime.combine(model.published_at, clock(), UTC)
    return ModelCard(
        name=model.name,
        title=model.title,
        modality=model.modality,
        owned_by=model.publisher,
        context_length=model.context_length,
        parameters=model.parameters,
        thinking=model.thinking,
        created=int(created.timestamp()),
    )
