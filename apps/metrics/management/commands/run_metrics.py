"""`manage.py run_metrics`: counts what ended into Postgres, Prometheus' counters and ClickHouse."""

from __future__ import annotations

import asyncio
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from apps.core.processes import stop_on_signal
from apps.core.redis import connect
from apps.metrics.writer import Writer


class Command(BaseCommand):
    help = "Count what ended, until SIGTERM. ClickHouse may be down meanwhile."

    def handle(self, *args: Any, **options: Any) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        stop = stop_on_signal()
        redis = connect(settings.ENV.redis_url)
        try:
            await Writer(redis).run(stop)
        finally:
            await redis.aclose()
