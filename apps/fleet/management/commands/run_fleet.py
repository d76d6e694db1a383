"""`manage.py run_fleet`: watches the workers and loads what is placed on them. Run two for a spare."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from apps.core.processes import stop_on_signal
from apps.core.redis import connect
from apps.fleet.controller import Controller


class Command(BaseCommand):
    help = "Watch the workers and load what is placed on them, until SIGTERM."

    def handle(self, *args: Any, **options: Any) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        stop = stop_on_signal()
        redis = connect(settings.ENV.redis_url)
        try:
            await Controller(redis, f"{socket.gethostname()}-{os.getpid()}").run(stop)
        finally:
            await redis.aclose()
