"""Configuration: read once from the environment into a frozen object, and refused loudly by name.

Order: the process environment, then `.env`, then `var/run/stack.env`, which `manage.py up` writes for the services it
embeds, so that every other command finds them. docs/configuration.md lists each variable.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from apps.core.types import ClassLimits, Priority

BASE_DIR = Path(__file__).resolve().parent.parent
VAR_DIR = Path(os.environ.get("VAR_DIR", BASE_DIR / "var")).resolve()
STACK_ENV = VAR_DIR / "run" / "stack.env"


class Env(BaseSettings):
    """Every variable the site reads. Durations are milliseconds where the name says `_ms`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_file=(STACK_ENV, BASE_DIR / ".env"), env_ignore_empty=True
    )

    # The three stores. `manage.py up` embeds those that are not given.
    database_url: str = Field("", description="postgresql://user:password@host:port/name")
    redis_url: str = Field("", description="redis://, rediss:// or unix://")
    clickhouse_url: str = Field("", description="http://user:password@host:8123/database")

    # The gateway.
    secret_key: SecretStr = Field(SecretStr(""), description="Django's signing key")
    port: int = Field(8000, ge=1, le=65535)
    bind: str = "127.0.0.1"
    debug: bool = False
    allowed_hosts: str = Field("localhost,127.0.0.1,[::1]", description="comma-separated host names")
    allowed_origins: str = Field("", description="comma-separated origins, besides our own, for WebSocket and CORS")
    log_level: str = "INFO"
    max_body_bytes: int = 1 << 20
    max_media_body_bytes: int = Field(36 << 20, description="where a body may hold pictures or audio")
    max_media_bodies_bytes: int = Field(256 << 20, description="of all bodies beyond MAX_BODY_BYTES that are being answered")
    max_file_bytes: int = Field(128 << 20, description="of an uploaded file")
    max_images: int = Field(16, description="images in one chat")
    max_image_bytes: int = 10 << 20
    max_images_bytes: int = Field(25 << 20, description="images in one chat, together")
    sse_keep_alive_ms: int = 5_000
    metrics_token: SecretStr = Field(SecretStr(""), description="bearer token that may scrape /metrics")

    # The scheduler.
    queue_max_requests: int = Field(1_000, description="waiting requests a lane holds before it refuses")
    queue_max_requests_per_org: int = 500
    queue_max_drain_ms: int = Field(300_000, description="predicted wait above which a lane refuses")
    class_flex: ClassLimits = ClassLimits(0.0, 120_000, 300_000, 1_800_000)
    class_default: ClassLimits = ClassLimits(15_000.0, 30_000, 60_000, 600_000)
    class_priority: ClassLimits = ClassLimits(60_000.0, 15_000, 60_000, 600_000)
    lease_ms: int = 5_000
    max_attempts: int = 2
    batch_window_ms: int = Field(4, description="how long the collector may hold a request while its workers are nearly full")
    batch_max_cost_ms: int = Field(2_000, description="predicted work that closes the collector's window early, at full load")
    affinity_ms: int = Field(300_000, description="how long a worker is remembered by the beginnings of prompts it took")
    events_ttl_ms: int = Field(600_000, description="how long a finished request's events can be read again")

    # Durable jobs.
    media_dir: Path = Field(VAR_DIR / "media", description="files of clients, on storage that every gateway and runner reaches")
    max_batch_lines: int = 10_000
    webhook_private_addresses: bool = Field(False, description="whether webhooks may be plain HTTP and lead inside")

    # The fleet.
    daemon_token: SecretStr = Field(SecretStr(""), description="shared by the site and its daemons")
    daemon_ca: Path | None = Field(None, description="who signed the daemons' certificates; without it the wire is plain")
    daemon_cert: Path | None = Field(None, description="the certificate that the site shows to daemons")
    daemon_key: Path | None = Field(None, description="its private key")
    models_dir: Path = VAR_DIR / "models"
    demo_models: str = Field("smollm2-135m", description="what `manage.py up` brings: names with commas, or all")
    worker_timeout_ms: int = Field(4_000, description="a worker silent, or stuck, for this long is out of routing")
    load_on_demand: bool = Field(True, description="load enabled models that requests ask for, placed or not")
    model_idle_seconds: int = Field(600, description="a model that is not placed is unloaded when unused for so long; 0: never")
    model_residency_ms: int = Field(5_000, description="how long a loaded model stays at least")
    model_turn_ms: int = Field(20_000, description="how long a model starves before one that is asked for too gives way")
    fleet_ssh_key: Path | None = Field(None, description="file of the private key that managed hosts let in")
    switch_drain_ms: int = Field(2_000, description="how long what runs may go on before a mode switch moves it")
    switch_load_ms: int = Field(600_000, description="how long models may take to load in the new mode")
    switch_demand_ms: int = Field(20_000, description="unmet demand that lasts this long has a host change its mode")
    switch_dwell_ms: int = Field(300_000, description="how long a mode is kept before demand may change it")

    @property
    def classes(self) -> dict[Priority, ClassLimits]:
        return {Priority.FLEX: self.class_flex, Priority.DEFAULT: self.class_default, Priority.PRIORITY: self.class_priority}


ENV = Env()
