"""`manage.py migrate_clickhouse`: brings ClickHouse's tables up to date."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from apps.metrics import clickhouse


class Command(BaseCommand):
    help = "Apply the numbered schema files that ClickHouse does not have yet."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            applied = clickhouse.migrate(clickhouse.connect())
        except clickhouse.UNAVAILABLE as error:
            raise CommandError(f"ClickHouse does not answer ({type(error).__name__}); check CLICKHOUSE_URL") from None
        self.stdout.write(f"applied {', '.join(applied)}" if applied else "up to date")
