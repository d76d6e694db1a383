"""Pages of the admin that show what is now: the placement board, whose data is at /api/board/, and the cost models."""

from __future__ import annotations

from asgiref.sync import async_to_sync
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET

from apps.console.ask import with_redis
from apps.scheduler.costs import every as cost_models


@require_GET
def board(request: HttpRequest) -> HttpResponse:
    return render(request, "admin/board.html", {**admin.site.each_context(request), "title": "Placement board"})


@require_GET
def costs(request: HttpRequest) -> HttpResponse:
    """The fitted cost models and how well they predict."""
    found = async_to_sync(with_redis)(cost_models)
    rows = [
        {"model": model, "device": device, "fit": fit}
        | ({"error_percent": 100 * fit.error, "context_ms": 1000 * fit.context_ms} if fit else {})
        for (model, device), fit in found.items()
    ]
    return render(request, "admin/costs.html", {**admin.site.each_context(request), "title": "Cost models", "costs": rows})
