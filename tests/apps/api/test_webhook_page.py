"""What docs/api/webhooks.md tells receivers to do with a call accepts ours, and nothing else."""

from __future__ import annotations

import re
import time

import openai
import pytest

from apps.api.webhooks import signature
from tests.services import ROOT

BODY = b'{"id": "evt_1", "object": "event", "type": "video.completed", "created_at": 1767225600, "data": {"id": "video_1"}}'


@pytest.fixture(scope="module")
def is_ours():
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api" / "webhooks.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(snippet, names)
    return names["is_ours"]


def test_the_page_s_snippet_knows_our_calls(is_ours) -> None:
    headers = signature("s3cret", "evt_1", int(time.time()), BODY)
    assert is_ours("s3cret", headers, BODY)
    assert not is_ours("s3cret", headers, BODY + b" ")
    assert not is_ours("other", headers, BODY)
    assert not is_ours("s3cret", signature("s3cret", "evt_1", int(time.time()) - 600, BODY), BODY)


def test_the_openai_sdk_knows_our_calls() -> None:
    client = openai.OpenAI(api_key="x", webhook_secret="s3cret")
    event = client.webhooks.unwrap(BODY.decode(), signature("s3cret", "evt_1", int(time.time()), BODY))
    assert event.data.id == "video_1"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(BODY.decode(), signature("other", "evt_1", int(time.time()), BODY))
