"""Who may use the management API."""

from __future__ import annotations

from typing import Any

from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from apps.core.types import Principal


class IsOperator(BasePermission):
    """Staff, or a key with the scope `admin`."""

    message = "This needs an operator: a staff account, or a key with the scope `admin`."

    def has_permission(self, request: Request, view: Any) -> bool:
        if isinstance(request.auth, Principal):
            return "admin" in request.auth.scopes
        return bool(request.user and request.user.is_active and request.user.is_staff)
