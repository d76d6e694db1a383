"""`manage.py bootstrap`: the first organization, operator and key, from ADMIN_PASSWORD and INFERENCE_BOOTSTRAP_KEY."""

from __future__ import annotations

import os
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from apps.accounts.services import bootstrap


class Command(BaseCommand):
    help = "Create the organization `demo`, the operator `admin` and a first API key. Safe to repeat."

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            password, key = os.environ["ADMIN_PASSWORD"], os.environ["INFERENCE_BOOTSTRAP_KEY"]
        except KeyError as missing:
            raise CommandError(f"Set {missing.args[0]} in the environment.") from None
        bootstrap(admin_password=password, api_key=key)
