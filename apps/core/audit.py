"""Records who changed what, wherever accounts keeps it: its siblings may not know it."""

from __future__ import annotations

from django.conf import settings
from django.utils.module_loading import import_string


def audit(actor: str, action: str, target: object) -> None:
    """One audit row, in the caller's transaction."""
    import_string(settings.AUDIT_RECORDER)(actor, action, target)
