"""A site without HTTP servers whose daemon is a real process with real models: for tests of what an API makes of them."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

from django.conf import settings
from redis.asyncio import Redis
from redis.exceptions import RedisError

from apps.core.errors import ServiceError
from apps.core.redis import shared
from apps.core.tasks import end
from apps.fleet import registry
from apps.fleet.daemon_client import DaemonClient
from apps.scheduler.dispatcher import Dispatcher
from tests.services import ROOT, free_port


class DaemonProcess:
    """`python -m gpu_daemon` with models to load at once."""

    def __init__(self, worker_id: str, models: Sequence[str], models_dir: Path, log: Path, *arguments: str) -> None:
        self.worker_id, self.models, self.models_dir = worker_id, list(models), models_dir
        self.address = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "gpu_daemon", "--worker-id", worker_id, "--port", self.address.rpartition(":")[2],
                   "--models-dir", str(models_dir), *arguments, "--preload", *models]  # fmt: skip
        self._output = log.open("ab")
        self.process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=self._output, stderr=self._output)

    def client(self) -> DaemonClient:
        return DaemonClient(self.address, settings.ENV.daemon_token.get_secret_value())

    async def follow(self, redis: Redis, ready: asyncio.Event) -> None:
        """Publishes what the daemon says, as the controller does; `ready` is set when every model is."""
        while True:
            client = self.client()
            with suppress(ServiceError, RedisError):
                async with aclosing(client.watch_status(100)) as statuses:
                    async for snapshot in statuses:
                        assert not [m.error for m in snapshot.models if m.state == "failed"], snapshot
                        await registry.publish(redis, dataclasses.replace(snapshot, address=self.address))
                        if {m.model for m in snapshot.models if m.state == "ready"} >= set(self.models):
                            ready.set()
            await client.close()
            await asyncio.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self._output.close()


@asynccontextmanager
async def real_site(redis: Redis, *daemons: DaemonProcess, seconds: float = 150) -> AsyncIterator[None]:
    """A dispatcher beside the daemons, until the block ends. The daemons are their makers' to stop."""
    stop, ready = asyncio.Event(), [asyncio.Event() for _ in daemons]
    followers = [asyncio.create_task(daemon.follow(redis, event)) for daemon, event in zip(daemons, ready, strict=True)]
    dispatcher = asyncio.create_task(Dispatcher(redis, "d0").run(stop))
    try:
        async with asyncio.timeout(seconds):
            for follower, event in zip(followers, ready, strict=True):
                waiting = asyncio.create_task(event.wait())
                await asyncio.wait({follower, waiting}, return_when=asyncio.FIRST_COMPLETED)
                await end(waiting)
                if follower.done():
                    follower.result()
        yield
    finally:
        stop.set()
        await end(*followers)  # gRPC may make a failure of a cancellation, which is followed by another try
        await asyncio.gather(dispatcher, return_exceptions=True)
        await shared().aclose()
