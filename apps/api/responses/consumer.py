"""`WS /v1/responses`: responses one after another over one socket, by the events that their streams have over HTTP.

A response that is not stored lives as long as the socket, so that the next one can go on from it.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

from django.db import DatabaseError
from redis.exceptions import RedisError

from apps.api import intake
from apps.api.answer import Answer
from apps.api.errors import STORE_UNAVAILABLE, error_body
from apps.api.responses import store
from apps.api.responses.items import Body
from apps.api.responses.schemas import SocketResponse
from apps.api.responses.turn import ResponseTurn, prepare_turn
from apps.api.socket import ApiSocket, InvalidFrame
from apps.core.errors import Conflict, ServiceError, Unauthenticated
from apps.core.types import Principal

MAX_WAITING = 16  # frames that wait for the response before them
MAX_REMEMBERED = 32  # responses that are not stored


class ResponsesConsumer(ApiSocket):
    """`remembered` has the conversations of this socket's responses, the latest last."""

    async def connect(self) -> None:
        self.remembered: dict[str, list[Body]] = {}
        self.waiting: asyncio.Queue[Body] = asyncio.Queue(MAX_WAITING)
        self.worker: asyncio.Task[None] | None = None
        await super().connect()

    def hung_up(self) -> None:
        if self.worker is not None:
            self.worker.cancel()

    async def handle(self, frame: Body) -> None:
        if self.principal is None:
            message = "Send your API key as `Authorization: Bearer sk-...` when you connect."
            raise Unauthenticated(message, code="missing_api_key")
        if frame.get("type") != "response.create":
            raise InvalidFrame("type is response.create.")
        if self.waiting.full():
            raise Conflict(f"{MAX_WAITING} responses wait on this socket already.", code="too_many_requests")
        self.waiting.put_nowait(frame)
        if self.worker is None:
            self.worker = asyncio.create_task(self._work(self.principal))

    async def _work(self, principal: Principal) -> None:
        while True:
            frame = await self.waiting.get()
            try:
                await self._respond(frame, principal)
            except ServiceError as error:
                self._forget(frame.get("previous_response_id"))
                await self.report(error, frame)
            except (RedisError, DatabaseError):
                await self.report(STORE_UNAVAILABLE, frame)

    async def _respond(self, frame: Body, principal: Principal) -> None:
        _, turn = await intake.counted(lambda: frame, SocketResponse, self._prepare, principal)
        answer = Answer(turn.prepared, turn.renderer, session=turn.body.session, ended=turn.ended)
        await answer.submit(principal)
        async with aclosing(answer.steps("")) as steps:
            async for bodies in steps:
                for body in bodies:
                    await self.send_frame(body)
        self._remember(turn)

    async def _prepare(self, body: SocketResponse, principal: Principal) -> ResponseTurn:
        return await prepare_turn(body, principal, self._recall)

    async def _recall(self, org_id: str, response_id: str) -> list[Body]:
        return self.remembered.get(response_id) or await store.conversation(org_id, response_id)

    def _remember(self, turn: ResponseTurn) -> None:
        response = turn.renderer.response
        if turn.body.stores or response["status"] not in ("completed", "incomplete"):
            return
        self.remembered[response["id"]] = [*turn.items, *response["output"]]
        if len(self.remembered) > MAX_REMEMBERED:
            del self.remembered[next(iter(self.remembered))]

    def _forget(self, response_id: Any) -> None:
        """A chain that failed is begun anew, or goes on from what is stored."""
        if isinstance(response_id, str):
            self.remembered.pop(response_id, None)

    async def report(self, error: ServiceError, frame: dict[str, Any] | None) -> None:
        await self.send_frame({"type": "error", "status": error.status, **error_body(error, "")})
