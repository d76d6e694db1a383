"""Deletes stored responses whose 30 days are over. Run it daily; until then they are hidden, not gone."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from apps.api.responses import store


class Command(BaseCommand):
    help = __doc__

    def handle(self, *args: Any, **options: Any) -> None:
        self.stdout.write(f"{store.purge()} responses deleted")
