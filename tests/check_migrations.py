"""Fails unless the migrations say what the models say. Needs no database."""

from __future__ import annotations

import os
import sys

import django
from django.apps import apps
from django.db.migrations.autodetector import MigrationAutodetector
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.state import ProjectState


def main() -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "inference_site.settings")
    os.environ.setdefault("SECRET_KEY", "not used")
    django.setup()
    loader = MigrationLoader(None)
    changes = MigrationAutodetector(loader.project_state(), ProjectState.from_apps(apps)).changes(graph=loader.graph)
    for label, migrations in changes.items():
        for operation in (operation for migration in migrations for operation in migration.operations):
            sys.stderr.write(f"{label}: {operation.describe()}; run `manage.py makemigrations`\n")
    return bool(changes)


if __name__ == "__main__":
    sys.exit(main())
