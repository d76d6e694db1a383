"""`POST /v1/responses/compact`: the model sums a conversation up, and the summary is sealed: it comes back as it went."""

from __future__ import annotations

from collections.abc import Sequence

from apps.api import prepare
from apps.api.prepare import Prepared
from apps.api.responses.items import Body, item_id
from apps.api.responses.render import ResponseRenderer
from apps.api.responses.schemas import NAMES, CompactRequest
from apps.api.responses.seal import sealed
from apps.api.responses.turn import Known, conversation
from apps.api.translate import naming
from apps.core.types import Event, Principal

_ASK = "Summarize this conversation so that it can go on from your summary alone. Keep names, numbers and decisions."


async def prepare_compaction(body: CompactRequest, principal: Principal) -> CompactionRenderer:
    """Raises NotFound, InvalidRequest, PermissionDenied or Unavailable."""
    known = await conversation(body, principal)
    with naming(NAMES, known.places):
        prepared = await prepare.chat(body.chat([*known.messages, {"role": "user", "content": _ASK}]), principal, "resp_")
    return CompactionRenderer(prepared, known)


class CompactionRenderer(ResponseRenderer):
    """What the user said stays, and the summary stands for the rest."""

    def __init__(self, prepared: Prepared, known: Known) -> None:
        super().__init__(prepared, {}, len(known.items))
        self._items = known.with_ids(prepared.request.id)

    def whole(self, events: Sequence[Event]) -> Body:
        answer = super().whole(events)
        summary = "".join(part["text"] for item in answer["output"] for part in item.get("content", ()))
        seal = sealed(self.prepared.request.org_id, summary)
        compaction = {
            "type": "compaction",
            "id": item_id("compaction", answer["id"], len(self._items)),
            "encrypted_content": seal,
        }
        kept = [item for item in self._items if item.get("role") == "user"]
        fields = {name: answer[name] for name in ("id", "created_at", "usage")}
        return {**fields, "object": "response.compaction", "output": [*kept, compaction]}
