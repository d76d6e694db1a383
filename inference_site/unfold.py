"""How the admin looks, and where its sidebar leads."""

from __future__ import annotations

from typing import Any

from django.templatetags.static import static
from django.urls import reverse_lazy


def _link(title: str, icon: str, name: str) -> dict[str, Any]:
    return {"title": title, "icon": icon, "link": reverse_lazy(name)}


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Inference Stack",
    "SITE_HEADER": "Inference Stack",
    "SITE_URL": reverse_lazy("console:home"),
    "SITE_ICON": lambda _: static("console/icon.svg"),
    "SHOW_VIEW_ON_SITE": False,
    "COLORS": {
        "primary": {
            "50": "#f4f2ff", "100": "#ebe8ff", "200": "#d9d3ff", "300": "#bcb2fe", "400": "#9a8ffb", "500": "#7a6cf7",
            "600": "#5a49e8", "700": "#4a3bcb", "800": "#3d32a5", "900": "#342d83", "950": "#201b57",
        }
    },
    "SIDEBAR": {
        "show_search": False,
        "navigation": [
            {
                "title": "Now",
                "items": [
                    _link("Placement board", "grid_view", "board"),
                    _link("Quotas", "data_usage", "quotas"),
                ],
            },
            {
                "title": "Accounts",
                "items": [
                    _link("Organizations", "domain", "admin:accounts_organization_changelist"),
                    _link("Plans", "speed", "admin:accounts_plan_changelist"),
                    _link("API keys", "key", "admin:accounts_apikey_changelist"),
                    _link("Users", "person", "admin:accounts_user_changelist"),
                    _link("Usage", "bar_chart", "admin:accounts_usageday_changelist"),
                    _link("Audit log", "history", "admin:accounts_auditlog_changelist"),
                ],
            },
            {
                "title": "Fleet",
                "items": [
                    _link("Models", "deployed_code", "admin:fleet_model_changelist"),
                    _link("Hosts", "dns", "admin:fleet_host_changelist"),
                    _link("Workers", "memory", "admin:fleet_worker_changelist"),
                    _link("GPUs", "developer_board", "admin:fleet_gpu_changelist"),
                    _link("Placements", "pin_drop", "admin:fleet_placement_changelist"),
                    _link("Cost models", "calculate", "costs"),
                ],
            },
            {
                "title": "Console",
                "items": [
                    _link("Playground", "chat", "console:home"),
                    _link("Dashboard", "monitoring", "console:dashboard"),
                    _link("Requests", "timeline", "console:timeline"),
                ],
            },
        ],
    },
}  # fmt: skip
