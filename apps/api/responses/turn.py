"""One turn of a conversation: from a body to a chat ready to submit, and what is kept of it at its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from apps.api import prepare
from apps.api.prepare import Prepared
from apps.api.responses import items, store
from apps.api.responses.items import Body, CompactionItem, Item, ItemReference
from apps.api.responses.render import ResponseRenderer
from apps.api.responses.schemas import NAMES, Conversation, CreateResponse
from apps.api.responses.seal import opened
from apps.api.strict import invalid
from apps.api.translate import naming
from apps.core.types import Principal, RequestFinished

Recall = Callable[[str, str], Awaitable[list[Body]]]  # (organization, response) to its conversation


@dataclass(frozen=True, slots=True)
class Known:
    """A conversation: its items, the messages of a chat that they are, and where the client sent each."""

    previous: list[Body]
    own: list[Body]
    messages: list[Body]
    places: list[str]

    @property
    def items(self) -> list[Body]:
        return [*self.previous, *self.own]

    def with_ids(self, response_id: str) -> list[Body]:
        """The items as they are kept with a response."""
        named = [{"id": items.item_id(item["type"], response_id, number), **item} for number, item in enumerate(self.own)]
        return [*self.previous, *named]


@dataclass(frozen=True, slots=True)
class ResponseTurn:
    """`items` are the conversation up to the answer."""

    body: CreateResponse
    prepared: Prepared
    renderer: ResponseRenderer
    items: list[Body]

    async def ended(self, finished: RequestFinished) -> None:
        if self.body.stores:
            await store.save(self.prepared.request.org_id, self.renderer.response, self.items)


async def prepare_turn(body: CreateResponse, principal: Principal, recall: Recall = store.conversation) -> ResponseTurn:
    """Raises NotFound, InvalidRequest, PermissionDenied or Unavailable, in the terms of a response."""
    known = await conversation(body, principal, recall)
    with naming(NAMES, known.places):
        prepared = await prepare.chat(body.chat(known.messages), principal, "resp_")
    renderer = ResponseRenderer(prepared, body.echo(tier=prepared.tier), len(known.items))
    return ResponseTurn(body, prepared, renderer, known.with_ids(prepared.request.id))


async def conversation(body: Conversation, principal: Principal, recall: Recall = store.conversation) -> Known:
    """What a body says, after what it goes on from. Raises NotFound or InvalidRequest."""
    previous = await recall(principal.org_id, body.previous_response_id) if body.previous_response_id else []
    if isinstance(body.input, str):
        own = [items.plain(items.MessageItem(role="user", content=body.input))]
    else:
        own = [await _own(item, f"input[{n}]", principal, previous) for n, item in enumerate(body.input)]
    chat = list(items.chat([*previous, *own], lambda seal: opened(principal.org_id, seal, "input")))
    places = ["instructions"] * bool(body.instructions) + [_place(number - len(previous), body) for number, _ in chat]
    return Known(previous, own, [message for _, message in chat], places)


def _place(number: int, body: Conversation) -> str:
    if number < 0:
        return "previous_response_id"
    return "input" if isinstance(body.input, str) else f"input[{number}]"


async def _own(item: Item, place: str, principal: Principal, previous: Sequence[Body]) -> Body:
    """Raises InvalidRequest for a reference to nothing, and for a compaction of someone else's."""
    if isinstance(item, CompactionItem):
        opened(principal.org_id, item.encrypted_content, f"{place}.encrypted_content")
    if not isinstance(item, ItemReference):
        return items.plain(item)
    known = next((found for found in previous if found["id"] == item.id), None)
    found = known or await store.item(principal.org_id, item.id)
    if found is None:
        raise invalid(f"{place}.id: there is no such item.", f"{place}.id")
    return found
