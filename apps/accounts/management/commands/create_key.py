"""`manage.py create_key --org NAME`: a key for an organization, made with it when it is new."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from apps.accounts.models import SCOPES, Organization
from apps.accounts.services import api_key_create, organization_create


class Command(BaseCommand):
    help = "Make an API key for an organization; the organization is created when it does not exist."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--org", required=True, help="the organization's name")
        parser.add_argument("--name", default="command line", help="what the key is for")
        parser.add_argument("--scope", action="append", choices=SCOPES, help="may be repeated; inference by default")
        parser.add_argument("--expires-days", type=int, help="days until the key expires; never by default")
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    def handle(self, *args: Any, **options: Any) -> None:
        organization = Organization.objects.filter(name=options["org"]).first()
        if organization is None:
            try:
                organization = organization_create(name=options["org"], actor="create_key")
            except ValidationError as error:
                raise CommandError(f"--org {options['org']}: {'; '.join(error.messages)}") from None
        days = options["expires_days"]
        key, secret = api_key_create(
            organization=organization,
            name=options["name"],
            actor="create_key",
            scopes=options["scope"] or ["inference"],
            expires_in=timedelta(days=days) if days else None,
        )
        row = {"id": str(key.pk), "organization": organization.name, "scopes": key.scopes, "key": secret}
        self.stdout.write(json.dumps(row) if options["json"] else f"{secret}\nShown this once: keep it now.")
