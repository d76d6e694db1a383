"""Who may ask, and how much. Private to this app: others use services, selectors, auth and quota."""

from __future__ import annotations

from typing import ClassVar

from django.contrib.auth.models import AbstractUser
from django.core.validators import MaxValueValidator, MinValueValidator, RegexValidator
from django.db import models
from django.utils import timezone

from apps.core.types import Priority, QuotaLimits

SCOPES = ("inference", "admin", "metrics")
_NAME = RegexValidator(r"^[a-z0-9][a-z0-9-]{0,62}$", "Use small letters, digits and dashes.")


class Limits(models.Model):
    """The five limits. Empty means: what the plan says, or no limit where there is no plan above."""

    requests_per_minute = models.PositiveIntegerField(null=True, blank=True)
    tokens_per_minute = models.PositiveIntegerField(null=True, blank=True)
    concurrent_requests = models.PositiveIntegerField(null=True, blank=True)
    tokens_per_day = models.PositiveBigIntegerField(null=True, blank=True)
    tokens_per_month = models.PositiveBigIntegerField(null=True, blank=True)

    FIELDS: ClassVar = (
        "requests_per_minute",
        "tokens_per_minute",
        "concurrent_requests",
        "tokens_per_day",
        "tokens_per_month",
    )

    class Meta:
        abstract = True


class Plan(Limits):
    """Limits and a share of the machines, given to many organizations at once."""

    name = models.SlugField(max_length=63, unique=True)
    weight = models.FloatField(
        default=1.0,
        validators=[MinValueValidator(0.01), MaxValueValidator(1000)],
        help_text="Share of the machines under load, relative to other organizations.",
    )
    max_priority = models.PositiveSmallIntegerField(
        choices=[(p.value, p.name.lower()) for p in Priority],
        default=Priority.DEFAULT,
        help_text="Highest service tier its requests may ask for.",
    )

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Organization(Limits):
    """The one who is charged: quota, fairness and usage are kept per organization."""

    name = models.CharField(max_length=63, unique=True, validators=[_NAME])
    plan = models.ForeignKey(Plan, on_delete=models.PROTECT, related_name="organizations")
    is_active = models.BooleanField(default=True, help_text="An inactive organization's keys are refused.")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name

    @property
    def limits(self) -> QuotaLimits:
        """Its own limits where it has them, else its plan's."""
        own = {name: getattr(self, name) for name in self.FIELDS}
        return QuotaLimits(**{k: getattr(self.plan, k) if v is None else v for k, v in own.items()})


class User(AbstractUser):
    """Someone who signs in to the console. Staff are operators of the whole installation."""

    organization = models.ForeignKey(Organization, on_delete=models.SET_NULL, null=True, blank=True, related_name="users")


class ApiKey(models.Model):
    """A credential of an organization. Only its SHA-256 is kept: 256 random bits need no slow hash."""

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="keys")
    name = models.CharField(max_length=100, help_text="What it is for.")
    prefix = models.CharField(max_length=16, editable=False, help_text="The visible beginning of the key.")
    digest = models.CharField(max_length=64, unique=True, editable=False)
    scopes = models.JSONField(default=list)
    priority = models.PositiveSmallIntegerField(
        choices=[(p.value, p.name.lower()) for p in Priority],
        default=Priority.DEFAULT,
        help_text="Scheduling class of its requests that ask for no service tier; at most what the plan includes.",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    last_used_at = models.DateTimeField(null=True, blank=True, editable=False)

    class Meta:
        ordering = ("-created_at",)
        verbose_name = "API key"

    def __str__(self) -> str:
        return f"{self.prefix}… ({self.name})"

    @property
    def state(self) -> str:
        """active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        return "expired" if expired else "active"


class UsageDay(models.Model):
    """What an organization used of one model on one UTC day, by key: the record that quotas start from."""

    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="usage")
    key_id = models.CharField(max_length=40)
    model = models.CharField(max_length=100)
    day = models.DateField()
    requests = models.PositiveBigIntegerField(default=0)
    prompt_tokens = models.PositiveBigIntegerField(default=0)
    completion_tokens = models.PositiveBigIntegerField(default=0)

    class Meta:
        ordering = ("-day",)
        verbose_name_plural = "usage days"
        constraints = [models.UniqueConstraint(fields=["organization", "day", "key_id", "model"], name="one_row_a_day")]

    def __str__(self) -> str:
        return f"{self.organization} {self.day} {self.model}"


class LedgerCursor(models.Model):
    """How far the ledger has been counted into UsageDay; moved in the same transaction, so nothing counts twice."""

    stream = models.CharField(max_length=40, primary_key=True)
    milliseconds = models.BigIntegerField(default=0)
    sequence = models.BigIntegerField(default=0)


class AuditLog(models.Model):
    """Who changed what. Written by services, never edited."""

    at = models.DateTimeField(default=timezone.now, db_index=True)
    actor = models.CharField(max_length=150)
    action = models.CharField(max_length=60)
    target = models.CharField(max_length=200)

    class Meta:
        ordering = ("-at",)

    def __str__(self) -> str:
        return f"{self.actor} {self.action} {self.target}"
