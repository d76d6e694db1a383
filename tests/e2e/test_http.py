"""What HTTP clients rely on beyond the SDK: framing, headers, health, disconnects, quota."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import RunningStack
from tests.services import ROOT

CHAT = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Tell a story."}]}


def counters(stack: RunningStack) -> dict[str, float]:
    text = httpx.get(f"{stack.url}/metrics", headers=stack.headers).text
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


def eventually(condition, seconds: float = 10):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_sse_is_framed_exactly(stack: RunningStack) -> None:
    with (
        stack.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 3}) as r,
    ):
        text = "".join(r.iter_text())
        assert r.headers["content-type"] == "text/event-stream"
        assert r.headers["cache-control"] == "no-cache"
    frames = [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames[-1] == "data: [DONE]"
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ready", "/readyz"])
def test_health_is_open_and_plain(stack: RunningStack, path: str) -> None:
    answer = httpx.get(stack.url + path)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"]


def test_metrics_are_for_those_who_may(stack: RunningStack) -> None:
    assert httpx.get(f"{stack.url}/metrics").status_code == 401
    secret = json.loads(stack.manage("create_key", "--org", "demo", "--json"))["key"]
    assert httpx.get(f"{stack.url}/metrics", headers={"Authorization": f"Bearer {secret}"}).status_code == 403
    assert "inference:requests_total" in str(counters(stack))


def test_a_plain_request_id_is_echoed_and_a_strange_one_is_not(stack: RunningStack) -> None:
    with stack.client() as client:
        assert client.get("/v1/models", headers={"x-request-id": "mine-12345"}).headers["x-request-id"] == "mine-12345"
        assert client.get("/v1/models", headers={"x-request-id": "host:80/../"}).headers["x-request-id"].startswith("req_")


def test_a_disconnect_frees_the_engine(stack: RunningStack) -> None:
    def running() -> float:
        return counters(stack).get('inference:num_requests_running{model_name="smollm2-135m"}', 0)

    body = {**CHAT, "stream": True, "max_tokens": 4000, "ignore_eos": True}
    before = counters(stack).get('inference:requests_total{code="cancelled",model_name="smollm2-135m",outcome="cancelled"}', 0)
    with stack.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if '"content":"' in line and '"content":""' not in line:
                assert running() == 1
                break
    eventually(lambda: running() == 0, 3)
    key = 'inference:requests_total{code="cancelled",model_name="smollm2-135m",outcome="cancelled"}'
    eventually(lambda: counters(stack).get(key, 0) == before + 1)


def test_200_parallel_requests_on_a_quota_of_50(stack: RunningStack) -> None:
    """Exactly 50 are admitted; the others are told when to come back; every one of them is counted."""
    secret = json.loads(stack.manage("create_key", "--org", "crowd", "--json"))["key"]
    with stack.client() as operator:
        org = next(o for o in operator.get("/api/organizations/").json()["results"] if o["name"] == "crowd")
        changed = operator.patch(f"/api/organizations/{org['id']}/", json={"requests_per_minute": 50})
        assert changed.status_code == 200, changed.text
    time.sleep(4.5)  # a gateway may believe the old limits for 4 s

    def one(_: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {secret}"}
        return httpx.post(f"{stack.url}/v1/chat/completions", json={**CHAT, "max_tokens": 1}, headers=headers, timeout=60)

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(one, range(200)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert sum(answer.status_code == 200 for answer in answers) == 50
    assert len(refused) == 150
    assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    assert {answer.json()["error"]["code"] for answer in refused} == {"rate_limit_exceeded"}
    ok = next(answer for answer in answers if answer.status_code == 200)
    assert ok.headers["x-ratelimit-limit-requests"] == "50"
    key = 'inference:requests_total{code="rate_limit_exceeded",model_name="smollm2-135m",outcome="refused"}'
    eventually(lambda: counters(stack).get(key, 0) == 150)


def test_the_management_api_is_for_operators(stack: RunningStack) -> None:
    secret = json.loads(stack.manage("create_key", "--org", "demo", "--json"))["key"]
    answer = httpx.get(f"{stack.url}/api/organizations/", headers={"Authorization": f"Bearer {secret}"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")
    assert httpx.get(f"{stack.url}/api/organizations/").status_code == 401
    schema = httpx.get(f"{stack.url}/api/schema/?format=json", headers=stack.headers)
    assert {"/api/organizations/", "/api/keys/", "/api/workers/"} <= set(schema.json()["paths"])


def test_the_management_api_refuses_unknown_fields_by_name(stack: RunningStack) -> None:
    with stack.client() as operator:
        answer = operator.post("/api/plans/", json={"name": "gold", "wieght": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "wieght")


def test_a_revoked_key_stops_within_five_seconds(stack: RunningStack) -> None:
    made = json.loads(stack.manage("create_key", "--org", "demo", "--json"))
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert httpx.get(f"{stack.url}/v1/models", headers=headers).status_code == 200
    httpx.post(f"{stack.url}/api/keys/{made['id']}/revoke/", headers=stack.headers)
    eventually(lambda: httpx.get(f"{stack.url}/v1/models", headers=headers).status_code == 401, 5)


def test_starting_twice_is_one_clear_line(stack: RunningStack) -> None:
    second = subprocess.run([sys.executable, "manage.py", "up"], cwd=ROOT, env=stack.env, capture_output=True, text=True)
    assert second.returncode == 1
    assert "already runs" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


def test_a_busy_port_is_one_clear_line(stack: RunningStack, tmp_path) -> None:
    env = {**stack.env, "VAR_DIR": str(tmp_path)}
    second = subprocess.run([sys.executable, "manage.py", "up"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert second.returncode == 1
    assert "is not free" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


def test_a_form_may_come_in_chunks(stack: RunningStack) -> None:
    """As the JavaScript SDK sends files."""
    parts = [
        b'--line\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n',
        b'--line\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n{}\r\n--line--\r\n',
    ]
    with stack.client() as client:
        headers = {"Content-Type": "multipart/form-data; boundary=line"}
        kept = client.post("/v1/files", content=iter(parts), headers=headers).json()
        assert client.get(f"/v1/files/{kept['id']}/content").text == "{}"
