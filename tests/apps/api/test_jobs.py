"""Videos, files, batches and webhooks: durable, run once, charged once, whatever dies on the way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.management import call_command
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts import auth
from apps.accounts.models import ApiKey
from apps.api import background, following
from apps.api.background import Background
from apps.core.database import in_database
from apps.fleet import selectors
from apps.jobs import services as jobs
from apps.jobs.models import Batch, BatchLine, Delivery, State, Video, Webhook
from tests.apps.api.test_queue import client, get
from tests.apps.fleet.fake_daemon import MEDIA
from tests.apps.scheduler import site as sites
from tests.apps.scheduler.site import Site, site
from tests.services import ROOT

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "smollm2-135m"
VIDEO = {"model": "cogvideox-2b", "prompt": "a lighthouse in a storm", "frames": 9, "steps": 5}


@pytest.fixture(autouse=True)
def fast(monkeypatch, settings, tmp_path: Path) -> None:
    monkeypatch.setattr(background, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(following, "WAITS", (0.05,))
    monkeypatch.setattr(sites, "MODELS", (CHAT, "cogvideox-2b"))
    settings.MEDIA_ROOT = tmp_path / "media"


@pytest.fixture
async def made(redis: Redis, tmp_path: Path, smollm2: Path) -> AsyncIterator[Site]:
    auth._cache.clear()
    selectors._cache.clear()
    await sync_to_async(call_command)("loaddata", "models", verbosity=0)
    async with site(redis, tmp_path / "log", workers=2, step_seconds=0.02) as running:
        yield running


@asynccontextmanager
async def runner() -> AsyncIterator[None]:
    stop = asyncio.Event()
    task = asyncio.create_task(Background().run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


async def until(ask, wanted, seconds: float = 15):
    async with asyncio.timeout(seconds):
        while (found := await ask()) not in wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


async def create_video(headers: dict[str, str], **fields: Any) -> dict[str, Any]:
    answer = await AsyncClient().post(
        "/v1/videos", json.dumps({**VIDEO, **fields}), content_type="application/json", headers=headers
    )
    assert answer.status_code == 200, answer.content
    return answer.json()


def status_of(headers: dict[str, str], video_id: str):
    async def ask() -> str:
        return (await get(headers, f"/v1/videos/{video_id}")).json()["status"]

    return ask


async def charges(made: Site) -> list[dict[str, Any]]:
    return [json.loads(fields["entry"]) for _, fields in await made.redis.xrange("ledger")]


async def upload(headers: dict[str, str], lines: list[Any], purpose: str = "batch") -> str:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode()
    form = {"purpose": purpose, "file": SimpleUploadedFile("requests.jsonl", text)}
    answer = await AsyncClient().post("/v1/files", form, headers=headers)
    assert answer.status_code == 200, answer.content
    return answer.json()["id"]


def line(number: int, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}]
    body = {"model": CHAT, "messages": messages, "max_tokens": 5, "seed": number, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


async def create_batch(headers: dict[str, str], file_id: str, **fields: Any):
    body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h", **fields}
    return await AsyncClient().post("/v1/batches", json.dumps(body), content_type="application/json", headers=headers)


def batch_status(headers: dict[str, str], batch_id: str):
    async def ask() -> str:
        return (await get(headers, f"/v1/batches/{batch_id}")).json()["status"]

    return ask


async def answers(headers: dict[str, str], file_id: str) -> list[dict[str, Any]]:
    data = (await get(headers, f"/v1/files/{file_id}/content")).content
    return [json.loads(row) for row in data.splitlines()]


# --- Videos ---


async def test_a_video_goes_from_queued_to_its_file(made: Site) -> None:
    headers = await client("maker")
    video = await create_video(headers)
    assert (video["status"], video["progress"], video["seconds"], video["size"]) == ("queued", 0, "1", "720x480")
    async with runner():
        await until(status_of(headers, video["id"]), ["completed"])
    done = (await get(headers, f"/v1/videos/{video['id']}")).json()
    assert done["progress"] == 100
    content = await get(headers, f"/v1/videos/{video['id']}/content")
    assert (content.content, content["Content-Type"]) == (MEDIA, "video/mp4")
    listed = (await get(headers, "/v1/videos")).json()
    assert [entry["id"] for entry in listed["data"]] == [video["id"]]
    assert [row["outcome"] for row in await charges(made)] == ["succeeded"]
    gone = await AsyncClient().delete(f"/v1/videos/{video['id']}", headers=headers)
    assert gone.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert (await get(headers, f"/v1/videos/{video['id']}")).status_code == 404


async def test_nobody_else_sees_a_video(made: Site) -> None:
    owner, stranger = await client("owner"), await client("stranger")
    video = await create_video(owner)
    paths = (f"/v1/videos/{video['id']}", f"/v1/videos/{video['id']}/content", "/v1/videos/video_none")
    told = [(await get(stranger, path)).json()["error"] for path in paths]
    assert {error["code"] for error in told} == {"not_found"}
    assert (await AsyncClient().delete(paths[0], headers=stranger)).status_code == 404
    assert (await get(stranger, "/v1/videos")).json()["data"] == []


async def test_a_cancelled_video_is_dropped_by_its_worker(made: Site) -> None:
    headers = await client("maker")
    for daemon in made.daemons:
        daemon.step_seconds = 0.5
    video = await create_video(headers)
    async with runner():
        await until(status_of(headers, video["id"]), ["in_progress"])
        await until(lambda: asyncio.sleep(0, sum(len(d._sequences) for d in made.daemons)), [1])
        answer = await AsyncClient().post(f"/v1/videos/{video['id']}/cancel", headers=headers)
        assert (answer.json()["status"], answer.json()["error"]["code"]) == ("failed", "cancelled")
        await until(lambda: asyncio.sleep(0, sum(len(d._sequences) for d in made.daemons)), [0], seconds=2)
    again = await AsyncClient().post(f"/v1/videos/{video['id']}/cancel", headers=headers)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "already_finished")
    assert [row["outcome"] for row in await charges(made)] == ["cancelled"]


async def test_a_video_of_a_revoked_key_fails(made: Site) -> None:
    headers = await client("maker")
    video = await create_video(headers)
    await in_database(ApiKey.objects.all().delete)
    async with runner():
        found = await until(lambda: in_database(lambda: Video.objects.get(pk=video["id"]).state), [State.FAILED])
    assert found == State.FAILED


@contextmanager
def runner_process() -> Iterator[subprocess.Popen[bytes]]:
    """`manage.py run_jobs` on the test's own database."""
    from django.conf import settings
    from django.db import connection

    base = os.environ["DATABASE_URL"].rpartition("/")[0]
    env = {**os.environ, "DATABASE_URL": f"{base}/{connection.settings_dict['NAME']}"}
    env["MEDIA_DIR"] = str(settings.MEDIA_ROOT)
    process = subprocess.Popen([sys.executable, "manage.py", "run_jobs"], cwd=ROOT, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stage", ["claimed", "in_progress", "nearly done"])
async def test_a_runner_that_is_killed_leaves_one_video_and_one_charge(made: Site, monkeypatch, stage: str) -> None:
    monkeypatch.setattr(jobs, "CLAIM_SECONDS", 1.0)
    headers = await client("maker")
    for daemon in made.daemons:
        daemon.step_seconds = 0.3
    video = await create_video(headers)

    async def reached() -> bool:
        row = await in_database(lambda: Video.objects.get(pk=video["id"]))
        if stage == "claimed":
            return row.attempt > 0
        return row.state == State.IN_PROGRESS and (stage == "in_progress" or row.progress >= 60)

    with runner_process() as process:
        await until(reached, [True], seconds=60)
        process.send_signal(signal.SIGKILL)
    async with runner():
        await until(status_of(headers, video["id"]), ["completed"], seconds=30)
    assert [row["outcome"] for row in await charges(made)] == ["succeeded"]
    row = await in_database(lambda: Video.objects.get(pk=video["id"]))
    assert row.attempt >= 2


async def test_a_video_outlives_a_flush_and_its_worker(made: Site) -> None:
    headers = await client("maker")
    for daemon in made.daemons:
        daemon.step_seconds = 0.2
    video = await create_video(headers)
    async with runner():
        await until(status_of(headers, video["id"]), ["in_progress"])
        await made.redis.flushdb()
        busy = await until(lambda: asyncio.sleep(0, next((d for d in made.daemons if d._sequences), None)), made.daemons)
        await made.kill(busy)
        await until(status_of(headers, video["id"]), ["completed"], seconds=60)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"size": "641x480"}, "invalid_value", "size"),
        ({"frames": 10}, "invalid_value", "frames"),
        ({"frames": 9, "seconds": "1"}, "invalid_value", "frames"),
        ({"seconds": "60", "frames": None}, "invalid_value", "seconds"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": "a\0b"}, "invalid_value", "prompt"),
        ({"model": CHAT}, "model_not_found", "model"),
        ({"webhook_url": "http://169.254.169.254/"}, "unsupported_parameter", "webhook_url"),
    ],
)
async def test_a_video_that_cannot_be_is_refused(made: Site, fields: dict[str, Any], code: str, param: str) -> None:
    headers = await client("maker")
    body = json.dumps({**VIDEO, **fields})
    answer = await AsyncClient().post("/v1/videos", body, content_type="application/json", headers=headers)
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


# --- Batches ---


async def test_each_line_of_a_batch_is_answered_once(made: Site) -> None:
    headers = await client("batcher")
    lines = [line(number) for number in range(20)] + [line(20, model="nothing"), line(21, max_tokens=0)]
    answer = (await create_batch(headers, await upload(headers, lines), metadata={"for": "test"})).json()
    assert (answer["status"], answer["metadata"]) == ("validating", {"for": "test"})
    async with runner():
        await until(batch_status(headers, answer["id"]), ["completed"])
    done = (await get(headers, f"/v1/batches/{answer['id']}")).json()
    assert done["request_counts"] == {"total": 22, "completed": 20, "failed": 2}
    good, bad = await answers(headers, done["output_file_id"]), await answers(headers, done["error_file_id"])
    assert sorted(row["custom_id"] for row in good) == sorted(f"line-{number}" for number in range(20))
    assert {row["response"]["status_code"] for row in good} == {200}
    assert good[0]["response"]["body"]["object"] == "chat.completion"
    assert good[0]["response"]["body"]["usage"]["completion_tokens"] == 5
    codes = {row["custom_id"]: row["response"]["body"]["error"]["code"] for row in bad}
    assert codes == {"line-20": "model_not_found", "line-21": "invalid_value"}
    rows = await charges(made)
    assert len({row["request_id"] for row in rows}) == len(rows) == 20
    assert {row["priority"] for row in rows} == {0}


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{"], "invalid_json"),
        ([line(1), line(1)], "duplicate_custom_id"),
        ([{**line(1), "url": "/v1/embeddings"}], "invalid_request"),
        ([{**line(1), "custom_id": 7}], "invalid_request"),
        ([{**line(1), "body": []}], "invalid_request"),
        ([" ", ""], "empty_file"),
    ],
)
async def test_a_file_that_is_no_batch_fails_it_by_line(made: Site, lines: list[Any], code: str) -> None:
    headers = await client("batcher")
    batch = (await create_batch(headers, await upload(headers, lines))).json()
    async with runner():
        await until(batch_status(headers, batch["id"]), ["failed"])
    assert (await get(headers, f"/v1/batches/{batch['id']}")).json()["errors"]["data"][0]["code"] == code


async def test_a_cancelled_batch_keeps_what_it_has(made: Site) -> None:
    headers = await client("batcher")
    for daemon in made.daemons:
        daemon.step_seconds = 0.1
    batch = (await create_batch(headers, await upload(headers, [line(n, max_tokens=3) for n in range(60)]))).json()
    async with runner():
        await until(lambda: in_database(BatchLine.objects.exclude(response__isnull=True).exists), [True])
        told = await AsyncClient().post(f"/v1/batches/{batch['id']}/cancel", headers=headers)
        assert told.json()["status"] == "cancelling"
        await until(batch_status(headers, batch["id"]), ["cancelled"])
    done = (await get(headers, f"/v1/batches/{batch['id']}")).json()
    good, bad = await answers(headers, done["output_file_id"]), await answers(headers, done["error_file_id"])
    assert {row["custom_id"] for row in good} | {row["custom_id"] for row in bad} == {f"line-{n}" for n in range(60)}
    assert len(good) + len(bad) == 60
    assert bad[0]["error"]["code"] == "batch_cancelled"
    await until(lambda: asyncio.sleep(0, sum(len(d._sequences) for d in made.daemons)), [0], seconds=3)


@pytest.mark.timeout(240)
async def test_a_batch_whose_runners_are_killed_again_and_again_answers_each_line_once(made: Site, monkeypatch) -> None:
    monkeypatch.setattr(jobs, "CLAIM_SECONDS", 1.0)
    headers = await client("batcher")
    for daemon in made.daemons:
        daemon.step_seconds = 0.05
    batch = (await create_batch(headers, await upload(headers, [line(n) for n in range(200)]))).json()
    for share in (0, 40, 100):

        async def reached(share: int = share) -> bool:
            answered = await in_database(BatchLine.objects.exclude(response__isnull=True).count)
            begun = await in_database(lambda: Batch.objects.get(pk=batch["id"]).attempt > 0)
            return begun and answered >= share

        with runner_process() as process:
            await until(reached, [True], seconds=60)
            process.send_signal(signal.SIGKILL)
    async with runner():
        await until(batch_status(headers, batch["id"]), ["completed"], seconds=60)
    done = (await get(headers, f"/v1/batches/{batch['id']}")).json()
    assert done["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    good = await answers(headers, done["output_file_id"])
    assert sorted(row["custom_id"] for row in good) == sorted(f"line-{number}" for number in range(200))
    rows = await charges(made)
    assert len({row["request_id"] for row in rows}) == len(rows) == 200


# --- Files ---


async def test_files_are_kept_listed_paged_and_removed(made: Site) -> None:
    headers, stranger = await client("owner"), await client("stranger")
    names = [await upload(headers, [{"n": number}], purpose="user_data") for number in range(5)]
    first = (await get(headers, "/v1/files?limit=2")).json()
    second = (await get(headers, f"/v1/files?limit=2&after={first['last_id']}")).json()
    third = (await get(headers, f"/v1/files?limit=2&after={second['last_id']}")).json()
    listed = [entry["id"] for page in (first, second, third) for entry in page["data"]]
    assert listed == names[::-1]
    assert [page["has_more"] for page in (first, second, third)] == [True, True, False]
    oldest = (await get(headers, "/v1/files?limit=1&order=asc")).json()["data"][0]
    assert (oldest["id"], oldest["filename"], oldest["purpose"]) == (names[0], "requests.jsonl", "user_data")
    assert (await get(headers, f"/v1/files/{names[0]}/content")).content == b'{"n": 0}'
    assert (await get(stranger, f"/v1/files/{names[0]}/content")).status_code == 404
    assert (await AsyncClient().delete(f"/v1/files/{names[0]}", headers=headers)).json()["deleted"]
    assert (await get(headers, f"/v1/files/{names[0]}")).status_code == 404
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=file-none"):
        assert (await get(headers, f"/v1/files?{query}")).status_code == 400
    refused = await create_batch(headers, names[1])
    assert refused.json()["error"]["param"] == "input_file_id"
    assert (await create_batch(stranger, names[1])).json()["error"]["param"] == "input_file_id"


# --- Webhooks ---


@contextmanager
def receiver(answers: list[int]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A server that answers with these statuses in turn, and what it was sent."""
    taken: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((dict(self.headers), self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(answers[min(len(taken), len(answers)) - 1])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", taken
    finally:
        server.shutdown()
        server.server_close()


async def test_the_end_of_a_video_is_told_once_signed_and_again_until_it_is_taken(made: Site, monkeypatch) -> None:
    from apps.api import webhooks
    from inference_site.env import Env

    monkeypatch.setattr(webhooks, "PAUSES", (0.2,) * 5)
    monkeypatch.setattr(Env, "webhook_private_addresses", True, raising=False)
    monkeypatch.setattr(webhooks, "require_public", lambda url: None)
    headers = await client("maker")
    video = await create_video(headers)
    org_id = await in_database(lambda: Video.objects.get(pk=video["id"]).org_id)
    with receiver([500, 200]) as (url, taken):
        hook = await in_database(lambda: Webhook.objects.create(org_id=org_id, url=url))
        async with runner():
            await until(lambda: in_database(Delivery.objects.exclude(delivered_at=None).count), [1])
    assert len(taken) == 2
    told, body = taken[-1]
    assert json.loads(body) | {"id": "", "created_at": 0} == {
        "id": "", "object": "event", "type": "video.completed", "created_at": 0, "data": {"id": video["id"]},
    }  # fmt: skip
    signed = f"{told['webhook-id']}.{told['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(hook.secret.encode(), signed, hashlib.sha256).digest()).decode()
    assert told["webhook-signature"] == f"v1,{expected}"
    assert taken[0][0]["webhook-id"] == told["webhook-id"]


@pytest.mark.parametrize("url", ["http://example.com/", "https://127.0.0.1/", "https://[::1]/", "https://10.0.0.1/x"])
def test_a_webhook_never_leads_inside(url: str) -> None:
    from apps.api.webhooks import require_public

    with pytest.raises(ValueError, match="not"):
        require_public(url)
