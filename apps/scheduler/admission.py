"""Refusals, pure: which error a bound becomes, and when a retry is worth it."""

from __future__ import annotations

from apps.core.errors import Unavailable

_MESSAGES = {
    "lane_full": "The queue for {model} is full.",
    "org_full": "Your organization already has as many requests waiting for {model} as one may have.",
    "drain": "The queue for {model} is longer than it would be useful to wait for.",
}
_ABSENCES = {
    "not_loaded": ("model_not_loaded", "{model} is not loaded on any worker. An operator can place it in the admin."),
    "no_weights": (
        "model_not_loaded",
        "The weights of {model} are not on this installation. An operator can fetch them with `manage.py models pull {model}`.",
    ),
    "load_failed": ("model_load_failed", "{model} cannot be loaded: {reason}."),
    "no_worker": ("no_capacity", "No worker is alive to run {model}."),
}


def queue_refusal(verdict: str, model: str, retry_ms: float, jitter: float) -> Unavailable:
    """The error for what enqueue.lua answered. `jitter` in [0, 1) spreads the retries of many clients over +-20%."""
    message = _MESSAGES[verdict].format(model=model)
    seconds = retry_after_seconds(retry_ms, jitter)
    return Unavailable(f"{message} Try again in {seconds:.0f} s.", code="queue_full", retry_after_seconds=seconds)


def absence_refusal(availability: str, model: str, reason: str = "") -> Unavailable:
    """The error for a model that no worker can run now. `availability` and `reason` are what apps.fleet.registry says."""
    code, message = _ABSENCES[availability]
    return Unavailable(
        message.format(model=model, reason=reason.rstrip(".")),
        code=code,
        param="model",
        retry_after_seconds=30.0 if code == "model_not_loaded" else 5.0,
        should_retry=False if code == "model_not_loaded" else None,
    )


def retry_after_seconds(retry_ms: float, jitter: float) -> float:
    """The predicted time spread by +-20%, within the 1 to 60 s that clients honour."""
    return min(60.0, max(1.0, retry_ms / 1000 * (0.8 + 0.4 * jitter)))
