"""What benches of a site without HTTP servers start: real stores, a dispatcher, and daemons that are processes with models."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.services import _start_services, pytest_unconfigure

if TYPE_CHECKING:
    from tests.real_site import DaemonProcess

# For what no weights are at hand, a tiny checkpoint of the same architecture.
TINY = ("sd-turbo", "cogvideox-2b", "qwen2.5-vl-3b")


def run(bench: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Runs `bench(redis)` on stores of its own, which end with it."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "inference_site.settings"
    _start_services()
    try:
        import django
        from django.core.management import call_command

        django.setup()
        call_command("migrate", verbosity=0)
        asyncio.run(_main(bench))
    finally:
        pytest_unconfigure()


async def _main(bench: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    from apps.core.redis import connect

    redis = connect(os.environ["REDIS_URL"])
    await redis.flushdb()
    await bench(redis)
    await redis.aclose()


def weights(folder: Path, *models: str) -> None:
    """Has the models in the folder: real ones, or tiny where there are none."""
    from apps.fleet.weights import is_here, make_tiny, pull

    for model in models:
        if model not in TINY:
            pull(model, folder, lambda *_: None)
        elif not is_here(folder / model):
            make_tiny(model, folder, lambda *_: None)


@asynccontextmanager
async def workers(
    redis: Any, folder: Path, *loads: tuple[str, ...], arguments: tuple[str, ...] = ()
) -> AsyncIterator[list[DaemonProcess]]:
    """A daemon for each of `loads`, the models that it has, and a dispatcher beside them."""
    from tests.real_site import DaemonProcess, real_site

    with tempfile.TemporaryDirectory() as logs, ExitStack() as started:
        daemons = [DaemonProcess(f"w{i}", models, folder, Path(logs) / str(i), *arguments) for i, models in enumerate(loads)]
        for daemon in daemons:
            started.callback(daemon.stop)
        async with real_site(redis, *daemons):
            yield daemons
