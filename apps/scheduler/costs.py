"""The fitted cost models in Redis: learnt from by the dispatchers, read by everyone. lua/observe.lua has the keys."""

from __future__ import annotations

from pathlib import Path

from redis.asyncio import Redis

from apps.core.redis import LuaScript
from apps.core.types import WorkerSnapshot
from apps.scheduler.cost import CostModel, cheapest, fit, reported

_LUA = Path(__file__).parent / "lua"
_OBSERVE = LuaScript(_LUA / "observe.lua", _LUA / "common.lua")


async def observe(redis: Redis, *, model: str, device: str, prompt_tokens: int, generated: int, gpu_ms: float) -> None:
    """Learns from one finished request, of which `prompt_tokens` were computed and not found in a cache."""
    before = await of_class(redis, model, device)
    predicted = before.ms(prompt_tokens, generated) if before else 0.0
    args: list[str | int | float] = [f"{model}|{device}", prompt_tokens, generated, gpu_ms, predicted]
    await _OBSERVE(redis, keys=[], args=args)


async def of_class(redis: Redis, model: str, device: str) -> CostModel | None:
    return fit(await redis.hgetall(f"cost:{model}|{device}"))


async def to_price_by(redis: Redis, model: str, workers: list[WorkerSnapshot]) -> CostModel:
    """The model's cost on the cheapest class of the workers that hold it."""
    devices = sorted({worker.device for worker in workers})
    fitted = [found for device in devices if (found := await of_class(redis, model, device))]
    return cheapest(fitted) or reported([resident for worker in workers if (resident := worker.resident(model))])


async def every(redis: Redis) -> dict[tuple[str, str], CostModel | None]:
    """Every (model, worker class) that anything finished on; None where it is too early for a fit."""
    names = sorted(await redis.smembers("costs"))
    return {(name.split("|")[0], name.split("|")[1]): fit(await redis.hgetall(f"cost:{name}")) for name in names}
