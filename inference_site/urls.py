"""Every route but those that apps/api/edge.py answers itself (/v1, health, /metrics)."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

from apps.console import operators, quotas
from apps.console.rest import BoardView

urlpatterns = [
    path("", RedirectView.as_view(pattern_name="console:home")),
    path("console/", include("apps.console.urls")),
    path("admin/board/", admin.site.admin_view(operators.board), name="board"),
    path("admin/costs/", admin.site.admin_view(operators.costs), name="costs"),
    path("admin/quotas/", admin.site.admin_view(quotas.quotas), name="quotas"),
    path("admin/quotas/<int:organization_id>/", admin.site.admin_view(quotas.edit), name="quota"),
    path("admin/", admin.site.urls),
    path("api/", include("apps.accounts.urls")),
    path("api/", include("apps.fleet.urls")),
    path("api/board/", BoardView.as_view(), name="board-data"),
    path("api/schema/", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs/", SpectacularSwaggerView.as_view(), name="docs"),
]
