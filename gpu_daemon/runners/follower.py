"""The ranks but the first: they do what rank 0 tells, in the order it tells, and know nothing of requests."""

from __future__ import annotations

import logging
import signal
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gpu_daemon.config import DaemonConfig
from gpu_daemon.runners.batch import Batch
from gpu_daemon.runners.parallel import Group, Message, Verb, lost
from gpu_daemon.runners.torch_decoder import TorchDecoder
from gpu_daemon.runners.torch_runner import TorchRunner, runner_options, set_threads

_LOG = logging.getLogger(__name__)


def follow(config: DaemonConfig, group: Group) -> None:
    """Returns when rank 0 leaves. Signals are rank 0's to heed."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    set_threads(config.threads, config.place.local_ranks)
    follower = _Follower(config, group)
    _LOG.info("rank %d follows", group.rank)
    try:
        while (message := group.hear()).verb is not Verb.LEAVE:
            follower.obey(message)
    except Exception as error:  # noqa: BLE001  The others are within a step that this rank has left.
        lost(f"following failed ({type(error).__name__}: {error})")
    group.leave()


class _Follower:
    """Owns this rank's share of every model. Loading does not hold up the steps of other models."""

    def __init__(self, config: DaemonConfig, group: Group) -> None:
        self._config = config
        self._group = group
        on_device = (lambda: torch.cuda.set_device(group.device)) if group.device.type == "cuda" else None
        self._loader = ThreadPoolExecutor(1, "load", initializer=on_device)
        self._shares: dict[int, Future[TorchDecoder]] = {}

    def obey(self, message: Message) -> None:
        numbers = message.numbers
        if message.verb is Verb.LOAD:
            name = bytes(numbers.tolist()).decode()
            self._shares[message.model] = self._loader.submit(self._load, name, message.model)
            return
        share = self._shares[message.model].result()
        if message.verb is Verb.STEP:
            share(Batch.from_flat(numbers))
        elif message.verb is Verb.SAVE:
            share.save(int(numbers[0]))
        elif message.verb is Verb.RESTORE:
            share.restore(int(numbers[0]), None)
        elif message.verb is Verb.FORGET:
            share.close()
            del self._shares[message.model]

    def _load(self, name: str, model: int) -> TorchDecoder:
        """What goes wrong here, rank 0 is told by `together`."""
        options = runner_options(self._config, str(self._group.device), self._group, model)
        try:
            decoder = TorchRunner.load(self._config.models_dir / name, options, lambda *_: None).decoder
        except Exception:
            _LOG.exception("rank %d cannot load %s", self._group.rank, name)
            raise
        assert isinstance(decoder, TorchDecoder)
        return decoder
