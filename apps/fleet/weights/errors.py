"""How fetching reports, and how it fails."""

from __future__ import annotations

from collections.abc import Callable

Report = Callable[[str, float], None]  # stage, and how far it is from 0 to 1


class WeightsError(Exception):
    """One line for people: what happened, and what to do."""
