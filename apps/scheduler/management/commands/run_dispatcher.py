"""`manage.py run_dispatcher`: leases requests, routes them to workers and publishes their tokens. Run as many as needed."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from apps.core.processes import stop_on_signal
from apps.core.redis import connect
from apps.scheduler.dispatcher import Dispatcher


class Command(BaseCommand):
    help = "Dispatch queued requests to the workers until SIGTERM; what still runs is handed to another dispatcher."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--log", type=Path, help="append every transition to this file, for `replay` and `simulate`")

    def handle(self, *args: Any, **options: Any) -> None:
        asyncio.run(self._main(options["log"]))

    async def _main(self, log: Path | None) -> None:
        stop = stop_on_signal()
        redis = connect(settings.ENV.redis_url)
        try:
            await Dispatcher(redis, f"{socket.gethostname()}-{os.getpid()}", log).run(stop)
        finally:
            await redis.aclose()
