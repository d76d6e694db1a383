"""`manage.py run_dispatcher`: leases requests, routes them to workers and publishes their tokens. Run as many as needed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from apps.core.redis import connect
from apps.scheduler.dispatcher import Dispatcher


class Command(BaseCommand):
    help = "Dispatch queued requests to the workers until SIGTERM; what still runs is handed to another dispatcher."

    def handle(self, *args: Any, **options: Any) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        redis = connect(settings.ENV.redis_url)
        try:
            await Dispatcher(redis, f"{socket.gethostname()}-{os.getpid()}").run(stop)
        finally:
            await redis.aclose()
