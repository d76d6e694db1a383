"""A daemon process by arithmetic, quick to start: `python -m tests.apps.fleet.modes.light [MODE] -m gpu_daemon ARGUMENTS`.

In MODE "broken" it says tensor_parallel and loads nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from protos import inference_pb2 as pb
from tests.apps.fleet.fake_daemon import FakeDaemon


class LightDaemon(FakeDaemon):
    mode = "individual"

    def status(self) -> pb.DaemonStatus:
        found = super().status()
        found.mode = self.mode
        return found


async def main(mode: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker-id")
    parser.add_argument("--port", type=int)
    parser.add_argument("--epoch", type=int)
    given, _ = parser.parse_known_args(arguments)
    daemon = LightDaemon(given.worker_id, models=[], token=os.environ["DAEMON_TOKEN"], epoch=given.epoch, step_seconds=0.01)
    daemon.mode = "tensor_parallel" if mode == "broken" else mode
    daemon.load_errors = {"tiny": "there is no room"} if mode == "broken" else {}
    daemon.port = given.port
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await daemon.start()
    await stop.wait()
    await daemon.stop()


place = sys.argv.index("-m")
asyncio.run(main(sys.argv[1] if place > 1 else "individual", sys.argv[place:]))
