"""The console's pages: parse, ask, render. What happens in them happens in the browser, over /v1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST
from redis.asyncio import Redis

from apps.accounts import quota
from apps.accounts.auth import session_principal
from apps.accounts.models import ApiKey, User
from apps.accounts.services import api_key_create, api_key_revoke
from apps.console.ask import bars, with_redis
from apps.console.samples import SAMPLES
from apps.core.errors import PermissionDenied, ServiceError
from apps.core.types import Principal
from apps.fleet import registry
from apps.metrics.selectors import dashboard as metrics_dashboard
from apps.scheduler import services

TABS = ("chat", "speech", "images", "video", "transcribe", "embeddings")
WINDOWS = {"15 minutes": 900, "1 hour": 3600, "24 hours": 86400, "7 days": 604800}
View = Callable[..., HttpResponse]


def _member(view: View) -> View:
    """For signed-in members of an organization; others are told what is missing."""

    @login_required
    @wraps(view)
    def guarded(request: HttpRequest, **arguments: Any) -> HttpResponse:
        try:
            principal = async_to_sync(session_principal)(request.user)
        except PermissionDenied as error:
            return render(request, "console/no_organization.html", {"message": error.message}, status=403)
        return view(request, principal, **arguments)

    return guarded


@require_GET
@_member
def playground(request: HttpRequest, principal: Principal) -> HttpResponse:
    return render(request, "console/playground.html", {"page": "playground", "tabs": TABS})


@require_GET
@_member
def quickstart(request: HttpRequest, principal: Principal) -> HttpResponse:
    context = {"page": "quickstart", "base_url": request.build_absolute_uri("/v1"), "samples": SAMPLES}
    return render(request, "console/quickstart.html", context)


@require_GET
@_member
def timeline(request: HttpRequest, principal: Principal) -> HttpResponse:
    return render(request, "console/timeline.html", {"page": "timeline", "request_id": request.GET.get("id", "")[:100]})


@require_GET
@_member
def dashboard(request: HttpRequest, principal: Principal) -> HttpResponse:
    return render(request, "console/dashboard.html", {"page": "dashboard", "windows": WINDOWS})


@require_GET
@_member
def dashboard_data(request: HttpRequest, principal: Principal) -> HttpResponse:
    """What the dashboard draws. Operators see every organization, others their own."""
    window = request.GET.get("window", "900")
    if window not in map(str, WINDOWS.values()):
        return HttpResponseBadRequest("window is one of " + ", ".join(map(str, WINDOWS.values())))
    org_id = "" if "admin" in principal.scopes else principal.org_id
    return JsonResponse(async_to_sync(_gather)(int(window), org_id))


async def _gather(window: int, org_id: str) -> dict[str, Any]:
    history = await metrics_dashboard(window, org_id)

    async def live(redis: Redis) -> dict[str, Any]:
        workers = await registry.workers(redis, timeout_ms=settings.ENV.worker_timeout_ms)
        return {"workers": [dataclasses.asdict(worker) for worker in workers], "load": await services.load()}

    try:
        return {**history, **await with_redis(live)}
    except ServiceError as error:
        return {**history, "workers": [], "load": {"lanes": {}, "dispatchers": 0}, "problem": error.message}


@require_http_methods(["GET", "POST"])
@_member
def keys(request: HttpRequest, principal: Principal) -> HttpResponse:
    secret = _create_key(request, principal) if request.method == "POST" else None
    use = async_to_sync(with_redis)(lambda redis: quota.use(redis, principal))
    found = ApiKey.objects.filter(organization_id=principal.org_id)
    context = {
        "page": "keys",
        "keys": found,
        "secret": secret,
        "bars": bars(use),
        "organization": _organization(request),
    }
    return render(request, "console/keys.html", context)


def _create_key(request: HttpRequest, principal: Principal) -> str:
    days = request.POST.get("days", "")
    name = request.POST.get("name", "").strip()[:100] or "unnamed"
    organization = _organization(request)
    _, secret = api_key_create(
        organization=organization,
        name=name,
        actor=str(request.user),
        expires_in=timedelta(days=min(3650, int(days))) if days.isdigit() and int(days) else None,
    )
    return secret


def _organization(request: HttpRequest) -> Any:
    return User.objects.select_related("organization").get(username=request.user.get_username()).organization


@require_POST
@_member
def revoke_key(request: HttpRequest, principal: Principal, key_id: int) -> HttpResponse:
    key = ApiKey.objects.filter(pk=key_id, organization_id=principal.org_id).first()
    if key is not None:
        api_key_revoke(key=key, actor=str(request.user))
    return redirect("console:keys")
