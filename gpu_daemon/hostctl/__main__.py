"""`python -m gpu_daemon.hostctl --config FILE VERB ...`; under SSH's forced command the words come from SSH_ORIGINAL_COMMAND.

    status | verify | start individual|tensor_parallel --epoch N [--beside M] | stop --epoch N

Answers one line of JSON. Exit status 0: done; 1: tried, failed and undone; 2: refused, nothing was touched.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from gpu_daemon.hostctl.config import MODES, read_config
from gpu_daemon.hostctl.control import Control
from gpu_daemon.hostctl.errors import Failed, Refused

MAX_EPOCH_DIGITS = 12
MAX_COMMAND = 200


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 2 or arguments[0] != "--config":
            raise Refused("usage: python -m gpu_daemon.hostctl --config FILE VERB ...")
        remote = os.environ.get("SSH_ORIGINAL_COMMAND")
        words = arguments[2:] if remote is None else _remote_words(remote)
        answer = run(words, Path(arguments[1]))
    except Refused as refusal:
        return _say({"ok": False, "error": str(refusal)}, 2)
    except Failed as failure:
        return _say({"ok": False, "error": str(failure)}, 1)
    return _say({"ok": True, **answer}, 0)


def run(words: list[str], config: Path) -> dict[str, Any]:
    """The one command that the words are, to the letter. Raises Refused or Failed."""
    match words:
        case ["status"]:
            return Control(read_config(config)).status()
        case ["verify"]:
            return Control(read_config(config)).verify()
        case ["stop", "--epoch", epoch]:
            return Control(read_config(config)).stop(_epoch(epoch))
        case ["start", mode, "--epoch", epoch] if mode in MODES:
            return Control(read_config(config)).start(mode, _epoch(epoch), 0)
        case ["start", mode, "--epoch", epoch, "--beside", other] if mode in MODES:
            return Control(read_config(config)).start(mode, _epoch(epoch), _epoch(other))
    raise Refused("this is no command of hostctl")


def _remote_words(command: str) -> list[str]:
    if len(command) > MAX_COMMAND:
        raise Refused("this is no command of hostctl")
    try:
        return shlex.split(command)
    except ValueError:
        raise Refused("this is no command of hostctl") from None


def _epoch(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= MAX_EPOCH_DIGITS):
        raise Refused("an epoch is a number")
    return int(word)


def _say(answer: dict[str, Any], status: int) -> int:
    try:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody listens; leave without a traceback
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
