"""The whole stack on one machine: which stores are embedded, which processes run, in what order they start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx

from apps.fleet.weights import Report
from inference_site.env import BASE_DIR, ENV, STACK_ENV, VAR_DIR
from inference_site.stack import demo, preflight
from inference_site.stack.errors import StackError
from inference_site.stack.postgres import Postgres, create_database
from inference_site.stack.secrets import secret, write_private
from inference_site.stack.supervisor import Program, Supervisor
from inference_site.stack.valkey import Valkey

READY_SECONDS = 180
RUN = VAR_DIR / "run"
LOGS = VAR_DIR / "log"
SECRETS = VAR_DIR / "secrets"
STORES, WORKERS, SITE = 1, 2, 3  # stages: started in this order, stopped in the other


class Stack:
    """Starts everything that section 2 of the README's process table names; `stop` ends it. Raises StackError."""

    def __init__(self) -> None:
        self._lock = preflight.lock(RUN)
        preflight.require_port(ENV.bind, ENV.port)
        preflight.require_space(VAR_DIR)
        self._models = demo.demo_models(ENV.demo_models)
        self.admin_password = secret(SECRETS, "admin_password")
        self.api_key = os.environ.get("INFERENCE_BOOTSTRAP_KEY") or secret(SECRETS, "api_key", "sk-")
        write_private(VAR_DIR / "demo_api_key", self.api_key)
        self._worker_port = preflight.free_port()
        self._postgres = None if os.environ.get("DATABASE_URL") else self._embed_postgres()
        self._valkey = None if os.environ.get("REDIS_URL") else self._embed_valkey()
        self._clickhouse_port = 0 if os.environ.get("CLICKHOUSE_URL") else preflight.free_port()
        self._environment = self._make_environment()
        self._supervisor = Supervisor(RUN, LOGS, self._programs(), BASE_DIR)

    # --- What runs ---

    def _embed_postgres(self) -> Postgres:
        return Postgres(VAR_DIR / "postgres", preflight.free_port(), secret(SECRETS, "postgres"))

    def _embed_valkey(self) -> Valkey:
        return Valkey(VAR_DIR / "valkey", preflight.free_port(), secret(SECRETS, "valkey"))

    def _make_environment(self) -> dict[str, str]:
        """What env.py of every process reads; written to var/run/stack.env for commands run by hand."""
        values = {
            "SECRET_KEY": secret(SECRETS, "secret_key"),
            "DAEMON_TOKEN": secret(SECRETS, "daemon_token"),
            "METRICS_TOKEN": secret(SECRETS, "metrics_token"),
            "PORT": str(ENV.port),
        }
        if self._postgres:
            values["DATABASE_URL"] = self._postgres.url
        if self._valkey:
            values["REDIS_URL"] = self._valkey.url
        if self._clickhouse_port:
            password = secret(SECRETS, "clickhouse")
            values["CLICKHOUSE_URL"] = f"http://inference:{password}@127.0.0.1:{self._clickhouse_port}/inference"
        given = {name: os.environ[name] for name in values if os.environ.get(name)}
        values |= given
        write_private(STACK_ENV, "\n".join(f"{name}={value}" for name, value in values.items()))
        return {**values, "VAR_DIR": str(VAR_DIR), "PYTHONUNBUFFERED": "1"}

    def _programs(self) -> list[Program]:
        stores = []
        if self._postgres:
            stores.append(Program("postgres", STORES, self._postgres.command, stop_signal="INT", autostart=True))
        if self._valkey:
            stores.append(Program("valkey", STORES, self._valkey.command, autostart=True))
        if self._clickhouse_port:
            command = [sys.executable, "-m", "inference_site.stack.clickhouse_server", "--path",
                       str(VAR_DIR / "clickhouse"), "--port", str(self._clickhouse_port)]  # fmt: skip
            password = {"CLICKHOUSE_PASSWORD": secret(SECRETS, "clickhouse")}
            stores.append(Program("clickhouse", STORES, command, password, autostart=True))
        daemon = [sys.executable, "-m", "gpu_daemon", "--worker-id", "local-0", "--port", str(self._worker_port),
                  "--models-dir", str(ENV.models_dir)]  # fmt: skip
        gateway = [sys.executable, "-m", "daphne", "--bind", ENV.bind, "--port", str(ENV.port), "--verbosity", "0",
                   "--ping-interval", "20", "--ping-timeout", "30", "--application-close-timeout", "5",
                   "--no-server-name", "inference_site.asgi:application"]  # fmt: skip
        return [
            *stores,
            Program("daemon", WORKERS, daemon, self._environment, stop_seconds=5),
            self._manage("dispatcher", "run_dispatcher"),
            self._manage("fleet", "run_fleet"),
            self._manage("metrics", "run_metrics"),
            self._manage("jobs", "run_jobs"),
            Program("gateway", SITE, gateway, self._environment),
        ]

    def _manage(self, name: str, command: str) -> Program:
        return Program(name, SITE, [sys.executable, "manage.py", command], self._environment)

    # --- Starting ---

    def start(self, say: Callable[[str], None], report: Report) -> None:
        """Returns when a chat could be answered. `say` gets a line a stage, `report` the progress of the weights."""
        with ThreadPoolExecutor() as threads:
            weights = threads.submit(demo.bring, self._models, ENV.models_dir, say, report)
            say("starting the stores")
            if self._postgres:
                self._postgres.prepare()
            if self._valkey:
                self._valkey.prepare()
            self._supervisor.start()
            prepared = threads.submit(self._prepare, say)
            self._finish(weights, prepared)
        say("waiting until a model is ready")
        self._wait_until_ready()

    def _finish(self, weights: Future[None], prepared: Future[None]) -> None:
        weights.result()
        self._supervisor.start_program("daemon")
        prepared.result()
        for name in ("fleet", "dispatcher", "gateway", "metrics", "jobs"):
            self._supervisor.start_program(name)

    def _prepare(self, say: Callable[[str], None]) -> None:
        if self._postgres:
            self._wait_for_postgres(self._postgres)
        say("bringing the database up to date")
        done = subprocess.run(
            [sys.executable, "manage.py", "prepare", "--worker-port", str(self._worker_port), "--model", *self._models],
            cwd=BASE_DIR,
            env={
                **os.environ,
                **self._environment,
                "ADMIN_PASSWORD": self.admin_password,
                "INFERENCE_BOOTSTRAP_KEY": self.api_key,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            (LOGS / "prepare.log").write_text(done.stdout + done.stderr)
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise StackError(f"the database could not be prepared: {last}; see {LOGS / 'prepare.log'}")

    def _wait_for_postgres(self, postgres: Postgres) -> None:
        import psycopg

        deadline = time.monotonic() + 30
        while True:
            try:
                return create_database(postgres.url)
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise StackError(f"Postgres did not start; see {LOGS / 'postgres.log'}") from None
                time.sleep(0.05)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        problem = "the gateway does not answer"
        while time.monotonic() < deadline:
            if (name := self._supervisor.failed()) is not None:
                raise StackError(f"{name} keeps dying; see {LOGS / name}.log")
            try:
                answer = httpx.get(f"{self.url}/readyz", timeout=2)
                if answer.status_code == 200:
                    return
                problem = "; ".join(answer.json()["problems"])
            except (httpx.TransportError, ValueError, KeyError):
                pass
            time.sleep(0.1)
        raise StackError(f"not ready after {READY_SECONDS} s: {problem}; logs are in {LOGS}")

    # --- Running and stopping ---

    @property
    def url(self) -> str:
        host = "127.0.0.1" if ENV.bind in ("0.0.0.0", "::") else ENV.bind
        return f"http://{host}:{ENV.port}"

    @property
    def alive(self) -> bool:
        return self._supervisor.alive

    @property
    def logs(self) -> Path:
        return LOGS

    def stop(self) -> None:
        self._supervisor.stop()
        STACK_ENV.unlink(missing_ok=True)
        self._lock.close()
