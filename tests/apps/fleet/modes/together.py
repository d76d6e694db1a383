"""A real daemon that says it is a tensor parallel group: what a host's configuration starts where no group is needed."""

import asyncio
import sys

from gpu_daemon.__main__ import _main
from gpu_daemon.config import from_arguments
from gpu_daemon.server import GpuDaemon
from protos import inference_pb2 as pb

_individual = GpuDaemon._status


def _together(self: GpuDaemon) -> pb.DaemonStatus:
    found = _individual(self)
    found.mode = "tensor_parallel"
    return found


GpuDaemon._status = _together
asyncio.run(_main(from_arguments(sys.argv[sys.argv.index("gpu_daemon") + 1 :])))
