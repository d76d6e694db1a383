"""What is asked for and cannot be served in the present modes, and the hosts that could change theirs for it.

Key: `unmet`, a hash of model -> "first last", ms by Redis TIME. Only models of the catalogue get in, so it stays small.
"""

from __future__ import annotations

import re
from pathlib import Path

from django.conf import settings
from redis.asyncio import Redis

from apps.core.database import in_database
from apps.core.redis import LuaScript, server_time_ms
from apps.fleet.models import Host, Mode, ModeSwitch
from apps.fleet.modes.auto import STALE_MS, Demand, SwitchableHost, Wish, choose
from apps.fleet.modes.record import workers_of
from apps.fleet.modes.services import switch_request

KEY = "unmet"
_NOTE = LuaScript(Path(__file__).parent.parent / "lua/demand.lua")


async def note(redis: Redis, model: str) -> None:
    """A request for a model of the catalogue found no worker."""
    await _NOTE(redis, keys=[KEY], args=[model, STALE_MS])


async def act(redis: Redis) -> Wish | None:
    """Asks for the switch that unmet demand calls for, if any. Raises Conflict and InvalidRequest, as switch_request."""
    demands = [found for name, row in (await redis.hgetall(KEY)).items() if (found := _demand(name, row))]
    if not demands:
        return None
    env, now_ms = settings.ENV, await server_time_ms(redis)
    hosts = await in_database(_switchable)
    wish = choose(demands, hosts, now_ms=now_ms, demand_ms=env.switch_demand_ms, dwell_ms=env.switch_dwell_ms)
    if wish is not None:
        await in_database(lambda: _ask(wish))
        await redis.hdel(KEY, wish.model)
    return wish


def _demand(model: str, row: str) -> Demand | None:
    """None for an entry that is none: others can write to Redis too."""
    found = re.fullmatch(r"(\d{1,15}) (\d{1,15})", row)
    return Demand(model, int(found[1]), int(found[2])) if found else None


def _switchable() -> list[SwitchableHost]:
    hosts = Host.objects.filter(is_managed=True, may_switch_itself=True)
    return [_view(host) for host in hosts.exclude(switches__ended_at=None, switches__isnull=False)]


def _view(host: Host) -> SwitchableHost:
    """Since the end of its last switch, whichever way that went: one that failed is not asked for at once again."""
    other = Mode.INDIVIDUAL if host.mode == Mode.TENSOR_PARALLEL else Mode.TENSOR_PARALLEL
    placed = {mode: frozenset(p.model for w in workers_of(host, mode) for p in w.placements) for mode in Mode.values}
    last = ModeSwitch.objects.filter(host=host).exclude(ended_at=None).order_by("-ended_at").first()
    since = last.ended_at if last and last.ended_at else host.added_at
    return SwitchableHost(host.pk, host.mode, int(since.timestamp() * 1000), placed[host.mode], placed[other], other)


def _ask(wish: Wish) -> None:
    switch_request(host=Host.objects.get(pk=wish.host_id), mode=wish.mode, actor=f"demand for {wish.model}")
