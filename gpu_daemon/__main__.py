"""`python -m gpu_daemon`: serves models on one device until SIGTERM, then finishes what runs and leaves.

Under torchrun: on one device a rank, together. Rank 0 serves; it listens only once every rank has come.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

# Before torch comes in: threads that spin at barriers lose several times what they gain when others want the cores too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gpu_daemon.config import DaemonConfig, from_arguments
from gpu_daemon.server import OPTIONS, GpuDaemon, TokenInterceptor

if TYPE_CHECKING:
    from gpu_daemon.runners.parallel import Group

_LOG = logging.getLogger("gpu_daemon")


async def serve(config: DaemonConfig, stop: asyncio.Event, group: Group | None = None) -> None:
    """Serves until `stop`; then refuses new work, lets the running finish for `drain_seconds`, and returns."""
    server = grpc.aio.server(interceptors=[TokenInterceptor(config.token)], options=OPTIONS)
    daemon = GpuDaemon(config, group)
    daemon.add_to(server)
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    await state.set("", health_pb2.HealthCheckResponse.SERVING)
    _listen(server, config)
    await server.start()
    _LOG.info("worker %s listens on %s:%s", config.worker_id, config.host, config.port)
    for name in config.preload:
        daemon.models.start_load(name)
    looking = asyncio.create_task(daemon.models.sessions.look())
    await stop.wait()
    looking.cancel()
    _LOG.info("draining")
    daemon.draining = True
    await state.enter_graceful_shutdown()
    await daemon.models.drain(config.drain_seconds)
    await daemon.models.close()
    await server.stop(grace=0.5)


def _listen(server: grpc.aio.Server, config: DaemonConfig) -> None:
    """Under TLS when there is a certificate: then callers show one too, beside the token."""
    address = f"{config.host}:{config.port}"
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        server.add_insecure_port(address)
        return
    pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], config.tls_ca.read_bytes(), require_client_auth=True)
    server.add_secure_port(address, credentials)


async def _main(config: DaemonConfig, group: Group | None = None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(config, stop, group)


def main(config: DaemonConfig) -> None:
    """Never returns by itself: all is saved and said, and taking torch to pieces would take seconds that a successor waits."""
    _run(config)
    logging.shutdown()
    os._exit(0)


def _run(config: DaemonConfig) -> None:
    if config.place.ranks == 1:
        asyncio.run(_main(config))
        return
    from gpu_daemon.runners.follower import follow
    from gpu_daemon.runners.parallel import join
    from gpu_daemon.runners.torch_runner import pick_device

    group = join(config.place, pick_device(config.device, config.place.local_rank))
    if config.place.rank:
        follow(config, group)
    else:
        asyncio.run(_main(config, group))
        group.leave()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    main(from_arguments(sys.argv[1:]))
