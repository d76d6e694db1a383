"""Each field that an SDK documents is honoured, accepted as docs/api/ says, or refused by its name: none is dropped unseen."""

from __future__ import annotations

import re
from typing import Any, get_type_hints

import httpx
import pytest

from tests.e2e.conftest import RunningStack
from tests.e2e.sdk_fields import ENDPOINTS, RECORDING, Endpoint
from tests.services import ROOT

TAKEN = ("Honoured:", "Accepted, without effect here:")
CASES = [pytest.param(endpoint, name, id=f"{endpoint}: {name}") for endpoint in ENDPOINTS for name in endpoint.fields]


def section(endpoint: Endpoint) -> str:
    page = (ROOT / "docs" / "api" / endpoint.page).read_text()
    found = re.search(rf"^## {endpoint.heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, f"{endpoint.page} has no section {endpoint.heading}"
    return found[1]


def listed(endpoint: Endpoint) -> set[str]:
    """The fields that the endpoint's page says are taken: what is in code marks in the paragraphs that begin as TAKEN."""
    paragraphs = [text for text in section(endpoint).strip().split("\n\n") if text.startswith(TAKEN)]
    assert paragraphs, f"{endpoint.page} says nothing of fields"
    words = " ".join(code for text in paragraphs for code in re.findall(r"`([^`]+)`", text)).split()
    return {re.split(r"[.\[:]", word)[0] for word in words}


def send(client: httpx.Client, endpoint: Endpoint, body: dict[str, Any]) -> httpx.Response:
    if not endpoint.form:
        return client.post(endpoint.address, json=body)
    parts = [(name, (None, value)) for name, value in body.items() if isinstance(value, str)]
    parts += [(name, value) for name, value in body.items() if isinstance(value, tuple)]
    return client.post(endpoint.address, files=parts)


@pytest.fixture(scope="module")
def input_file(media_stack: RunningStack) -> str:
    """The id of a file for batches."""
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "minilm-l6-v2", "input": "hi"}}'
    with media_stack.client() as client:
        answer = client.post("/v1/files", data={"purpose": "batch"}, files={"file": ("lines.jsonl", line)})
        return answer.raise_for_status().json()["id"]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=str)
def test_the_table_has_every_field_of_the_sdk(endpoint: Endpoint) -> None:
    assert set(endpoint.fields) == set(get_type_hints(endpoint.documented))


@pytest.mark.parametrize(("endpoint", "name"), CASES)
def test_a_field_is_honoured_or_refused_by_name(
    media_stack: RunningStack, fox: bytes, input_file: str, endpoint: Endpoint, name: str
) -> None:
    real = {RECORDING: (RECORDING[0], fox, RECORDING[2]), "(uploaded by the test)": input_file}
    body = {**endpoint.good, **endpoint.files, **endpoint.fields[name]}
    body = {key: real.get(value, value) if isinstance(value, str | tuple) else value for key, value in body.items()}
    with media_stack.client() as client:
        response = send(client, endpoint, body)
        if response.status_code == 200:
            assert name in listed(endpoint), f"{name} is taken, and {endpoint.page} does not say so"
            return
        error = response.json()["error"]
        param = error["param"] if "param" in error else re.split(r"[: ]", error["message"])[0]
        assert re.split(r"[.\[]", param)[0] == name, error
        assert response.status_code == 400
        if "is not supported here" in error["message"]:
            assert name not in listed(endpoint), f"{name} is refused, and {endpoint.page} says that it is taken"
        else:
            assert error.get("code", "invalid_value") == "invalid_value", error
