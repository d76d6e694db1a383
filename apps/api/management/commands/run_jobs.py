"""`manage.py run_jobs`: runs videos and batches and delivers webhooks. Run as many as needed."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

from django.core.management.base import BaseCommand

from apps.api.background import Background


class Command(BaseCommand):
    help = "Run durable jobs (videos, batches, webhooks) until SIGTERM; what still runs is handed to another runner."

    def handle(self, *args: Any, **options: Any) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Background().run(stop)
