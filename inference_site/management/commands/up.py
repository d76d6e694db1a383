"""`manage.py up`: the whole stack on this machine, from nothing to a first answer."""

from __future__ import annotations

import json
import signal
import threading
from typing import Any

import httpx
from django.core.management.base import BaseCommand, CommandError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from inference_site.stack.demo import MODEL
from inference_site.stack.errors import StackError
from inference_site.stack.stack import Stack

_OFFER = (
    "  speech     manage.py models pull kokoro-82m, then DEMO_MODELS=kokoro-82m make run; DEMO_MODELS=all has every modality\n"
)
QUESTION = "In one sentence, why is the sky blue?"


class Command(BaseCommand):
    help = "Start and supervise the whole stack, answer a first question, and serve until Ctrl-C."
    requires_system_checks: list[str] = []  # the database they would ask is not up yet

    def handle(self, *args: Any, **options: Any) -> None:
        self._stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            stack = Stack()
        except StackError as error:
            raise CommandError(str(error)) from None
        try:
            self._serve(stack)
        except _Stopped:
            pass
        except StackError as error:
            raise CommandError(str(error)) from None
        finally:
            self._stop.set()
            self._line("stopping")
            stack.stop()

    def _on_signal(self, number: int, frame: Any) -> None:
        """The first one ends what is being waited for; stopping itself is not interrupted."""
        if not self._stop.is_set():
            self._stop.set()
            raise _Stopped

    def _serve(self, stack: Stack) -> None:
        console = Console()
        with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True,
                      disable=not console.is_terminal) as bar:  # fmt: skip
            task = bar.add_task("weights", total=1.0)
            said: set[str] = set()

            def report(stage: str, progress: float) -> None:
                bar.update(task, description=f"weights of {stage}", completed=progress)
                if not console.is_terminal and stage not in said:
                    said.add(stage)
                    self._line(f"weights of {stage}")

            stack.start(lambda line: console.print(f"· {line}", highlight=False), report)
        self._greet(stack)
        while stack.alive:
            self._stop.wait(1)
        raise StackError(f"the supervisor ended; logs are in {stack.logs}")

    def _greet(self, stack: Stack) -> None:
        self._line(f"\n> {QUESTION}")
        for piece in _stream_answer(stack):
            self.stdout.write(piece, ending="")
            self.stdout.flush()
        self._line(
            f"\n\nready\n"
            f"  base URL   {stack.url}/v1\n"
            f"  API key    {stack.api_key}   (also in var/demo_api_key)\n"
            f"  console    {stack.url}/console/\n"
            f"  admin      {stack.url}/admin/\n"
            f"  login      admin / {stack.admin_password}\n"
            f"  logs       {stack.logs}\n"
            f"{_OFFER}"
            f"Ctrl-C stops everything."
        )

    def _line(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()


class _Stopped(BaseException):
    """A signal asked to stop. Not an Exception, so that nothing on the way mistakes it for a failure."""


def _stream_answer(stack: Stack) -> Any:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 60,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    url = f"{stack.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
        if response.status_code != 200:
            raise StackError(f"the first question was answered with {response.status_code}; logs are in {stack.logs}")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise StackError(f"the first question failed: {chunk['error']['message']}")
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
