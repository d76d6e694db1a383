"""Django settings, grouped by concern. Values come from `env.py` alone."""

from __future__ import annotations

from pathlib import Path

import dj_database_url

from inference_site.env import BASE_DIR, ENV, VAR_DIR
from inference_site.unfold import UNFOLD

__all__ = ["ENV", "UNFOLD", "VAR_DIR"]

# --- Wiring ---
ROOT_URLCONF = "inference_site.urls"
ASGI_APPLICATION = "inference_site.asgi.application"
INSTALLED_APPS = [
    "daphne",
    "unfold",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "channels",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "apps.core",
    "apps.accounts",
    "apps.fleet",
    "apps.metrics",
    "apps.scheduler",
    "apps.jobs",
    "apps.api",
    "apps.console",
    "inference_site",
]
MIDDLEWARE = [
    # First, because it answers /v1 itself: the ones below cost a thread hop each.
    "apps.api.edge.api_edge",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

# --- Stores ---
DATABASES = {
    "default": {
        **dj_database_url.parse(ENV.database_url or "postgresql:///inference"),
        "CONN_MAX_AGE": 0,
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 8, "timeout": 5}, "connect_timeout": 2},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
FIXTURE_DIRS = [BASE_DIR / "fixtures"]

# --- Security ---
SECRET_KEY = ENV.secret_key.get_secret_value()
DEBUG = ENV.debug
ALLOWED_HOSTS = [host.strip() for host in ENV.allowed_hosts.split(",") if host.strip()]
AUTH_USER_MODEL = "accounts.User"
AUTH_PASSWORD_VALIDATORS = [{"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"}]
LOGIN_URL = "console:login"
LOGIN_REDIRECT_URL = "console:home"
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_FAILURE_VIEW = "apps.api.errors.csrf_failure"
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = ENV.max_media_body_bytes  # what each address takes is known to apps/api/routes.py

# --- Pages ---
LANGUAGE_CODE = "en-us"
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"
STATIC_ROOT: Path = VAR_DIR / "static"
MEDIA_ROOT: Path = ENV.media_dir  # what clients were given or gave; never served as such

# --- Metrics ---
# Called by the metrics writer with (ledger id, entry) pairs; the two apps do not know each other.
USAGE_RECORDER = "apps.accounts.services.usage_record"
# Called by apps.core.audit with (actor, action, target).
AUDIT_RECORDER = "apps.accounts.services.audit"

# --- REST ---
REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "apps.accounts.auth.ApiKeyAuthentication",
        "apps.accounts.auth.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["apps.accounts.permissions.IsOperator"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    "DEFAULT_PAGINATION_CLASS": "rest_framework.pagination.CursorPagination",
    "PAGE_SIZE": 50,
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "apps.api.errors.drf_exception_handler",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Inference Stack management API",
    "VERSION": "1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
}

# --- Logs ---
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": ENV.log_level},
    "loggers": {
        "httpx": {"level": "WARNING"},
        "django.request": {"level": "CRITICAL"},  # apps.api.access and apps.api.edge say it already
        "clickhouse_connect": {"level": "CRITICAL"},  # the writer says it
    },
}
