"""The pages about the queue: a request's timeline for members, the cost models for operators."""

from __future__ import annotations

import pytest
from asgiref.sync import sync_to_async
from django.test import AsyncClient
from redis.asyncio import Redis

from apps.accounts.models import User
from apps.accounts.services import organization_create
from apps.scheduler import costs

pytestmark = pytest.mark.django_db(transaction=True)


async def signed_in(name: str, *, staff: bool) -> AsyncClient:
    def make() -> User:
        organization = organization_create(name=name, actor="me")
        return User.objects.create_user(
            name, password="long enough", organization=organization, is_staff=staff, is_superuser=staff
        )

    client = AsyncClient()
    await client.aforce_login(await sync_to_async(make)())
    return client


async def test_the_cost_models_are_shown_with_their_error(redis: Redis) -> None:
    for number in range(60):
        prompt, generated = 10 + number % 7, 5 + number % 11
        gpu_ms = 7.0 + 0.5 * prompt + 3.0 * generated
        await costs.observe(redis, model="m", device="cpu", prompt_tokens=prompt, generated=generated, gpu_ms=gpu_ms)
    fitted = (await costs.every(redis))["m", "cpu"]
    assert (fitted.prefill_ms, fitted.decode_ms, fitted.request_ms) == pytest.approx((0.5, 3.0, 7.0), rel=1e-5)
    assert fitted.error < 1e-6
    page = (await (await signed_in("ops", staff=True)).get("/admin/costs/")).content.decode()
    assert "3.000 ms" in page
    assert "7.000 ms" in page
    assert "0.0 %" in page


async def test_the_cost_models_are_for_operators(redis: Redis) -> None:
    assert (await (await signed_in("member", staff=False)).get("/admin/costs/")).status_code == 302


async def test_the_timeline_page_is_there_and_escapes_what_it_is_asked(redis: Redis) -> None:
    page = await (await signed_in("reader", staff=False)).get("/console/requests/?id=%22%3E%3Cscript%3E")
    assert page.status_code == 200
    assert "<script>" not in page.content.decode().split("</head>")[1]
