"""`python -m gpu_daemon`: serves models on one device until SIGTERM, then finishes what runs and leaves."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gpu_daemon.config import DaemonConfig, from_arguments
from gpu_daemon.server import OPTIONS, GpuDaemon, TokenInterceptor

_LOG = logging.getLogger("gpu_daemon")


async def serve(config: DaemonConfig, stop: asyncio.Event) -> None:
    """Serves until `stop`; then refuses new work, lets the running finish for `drain_seconds`, and returns."""
    server = grpc.aio.server(interceptors=[TokenInterceptor(config.token)], options=OPTIONS)
    daemon = GpuDaemon(config)
    daemon.add_to(server)
    state = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    await state.set("", health_pb2.HealthCheckResponse.SERVING)
    _listen(server, config)
    await server.start()
    _LOG.info("worker %s listens on %s:%s", config.worker_id, config.host, config.port)
    for name in config.preload:
        daemon.models.start_load(name)
    warming = asyncio.create_task(daemon.models.warm())
    await stop.wait()
    warming.cancel()
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


async def _main(config: DaemonConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await serve(config, stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(_main(from_arguments(sys.argv[1:])))
