"""ClickHouse: the connection, the numbered migrations, and inserts that may safely be sent twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from django.conf import settings
from urllib3.exceptions import HTTPError

from apps.metrics.records import COLUMNS, LedgerEntry

SCHEMA = Path(__file__).parent / "schema"
# What a server that is down, restarting or unwell raises.
UNAVAILABLE = (ClickHouseError, HTTPError, OSError)


def connect() -> Client:
    """A client of CLICKHOUSE_URL. Raises one of UNAVAILABLE."""
    return clickhouse_connect.get_client(
        dsn=settings.ENV.clickhouse_url, compress=False, connect_timeout=2, send_receive_timeout=10,
        autogenerate_session_id=False,
    )  # fmt: skip


def migrate(client: Client) -> list[str]:
    """Applies the schema files that have not been, in the order of their numbers. Returns their names."""
    client.command(
        "CREATE TABLE IF NOT EXISTS migrations (name String, applied_at DateTime DEFAULT now()) "
        "ENGINE = MergeTree ORDER BY name"
    )
    applied = {row[0] for row in client.query("SELECT name FROM migrations").result_rows}
    pending = [path for path in sorted(SCHEMA.glob("*.sql")) if path.stem not in applied]
    for path in pending:
        client.command(path.read_text())
        client.insert("migrations", [[path.stem]], column_names=["name"])
    return [path.stem for path in pending]


def insert(client: Client, entries: Sequence[LedgerEntry], token: str) -> None:
    """Writes rows; the same `token` again writes nothing."""
    rows = [entry.row() for entry in entries]
    client.insert("requests", rows, column_names=COLUMNS, settings={"insert_deduplication_token": token})


def rows(client: Client, sql: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """A query's rows by column name, within 5 s."""
    result = client.query(sql, parameters=parameters, settings={"max_execution_time": 5})
    return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]
