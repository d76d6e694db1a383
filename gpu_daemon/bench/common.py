"""What every benchmark has in common: its first options, and how it says what it found."""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Iterable

import torch

from gpu_daemon.runners.torch_runner import pick_device, set_threads


def options(about: str | None, models: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gpu_daemon.bench", description=about)
    parser.add_argument("--model", choices=sorted(models), required=True)
    parser.add_argument("--tiny", action="store_true", help="a small network of the same architecture: does it run at all")
    parser.add_argument("--device", default="auto", help="cpu, cuda:N, or auto")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU; 0 is one a physical core")
    return parser


def begin(args: argparse.Namespace) -> str:
    """Says what is measured where; returns the device."""
    device = pick_device(args.device)
    set_threads(args.threads)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    say(args.model + " tiny" * args.tiny, name, f"torch {torch.__version__}")
    return device


def peak_gib(device: str) -> str:
    """The most that was used of the device's memory, or by this process."""
    on_device = device.startswith("cuda")
    used = torch.cuda.max_memory_allocated(device) if on_device else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return f"{used / 2**30:.2f}"


def say_peak(device: str) -> None:
    say("peak memory", f"{peak_gib(device)} GiB")


def say(*columns: object) -> None:
    sys.stdout.write(" ".join(f"{column!s:>18}" for column in columns) + "\n")
    sys.stdout.flush()
