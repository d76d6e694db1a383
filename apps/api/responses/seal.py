"""Summaries of conversations, sealed: clients carry them, and only the organization they were made for can use them."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from hashlib import sha256

from cryptography.fernet import Fernet, InvalidToken
from django.conf import settings

from apps.api.strict import invalid


def sealed(org_id: str, summary: str) -> str:
    return _fernet(org_id).encrypt(summary.encode()).decode()


def opened(org_id: str, content: str, param: str) -> str:
    """Raises InvalidRequest for what was not sealed here for this organization."""
    try:
        return _fernet(org_id).decrypt(content.encode()).decode()
    except InvalidToken:
        raise invalid(f"{param}: was not made here.", param) from None


def _fernet(org_id: str) -> Fernet:
    return Fernet(urlsafe_b64encode(sha256(f"compaction:{org_id}:{settings.SECRET_KEY}".encode()).digest()))
