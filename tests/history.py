"""One checker for every fault test: the invariants I1-I12, asserted on what the processes wrote down.

`log` is the scheduler's event log, every transition in Redis' own order; `ledger` its rows; `clients` what each client was
given. An operation whose outcome a client cannot know is in neither list, and is never held against anyone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from apps.core.types import Event, MediaDelta, RequestFinished, TextDelta
from apps.scheduler.replay import Replay, cost_of, pairs

Entry = Mapping[str, str]


@dataclass
class Client:
    """What one client sent and was given. `expected` are the tokens of an undisturbed run, by choice."""

    request_id: str
    org: str
    expected: Mapping[int, Sequence[int]]
    events: list[Event] = field(default_factory=list)
    accepted: bool = True

    @property
    def end(self) -> RequestFinished:
        return next(event for event in self.events if isinstance(event, RequestFinished))

    def tokens(self, choice: int = 0) -> list[int]:
        return [token for event in self.events if is_output(event, choice) for token in produced(event)]


def is_output(event: Event, choice: int) -> TypeGuard[TextDelta | MediaDelta]:
    return isinstance(event, TextDelta | MediaDelta) and event.choice == choice


def produced(event: TextDelta | MediaDelta) -> Sequence[int]:
    """Token ids; of what is no text, the numbers of its units."""
    return event.token_ids if isinstance(event, TextDelta) else range(event.first_index, event.first_index + event.units)


def check(log: Sequence[Entry], ledger: Iterable[Mapping[str, Any]], clients: Iterable[Client]) -> None:
    """Raises AssertionError that names the invariant and the request."""
    clients = [client for client in clients if client.accepted]
    rows = [row for row in ledger if row["outcome"] != "refused"]
    _transitions(log)
    replay = Replay()
    assert replay.run(log).differences == [], "the log does not replay"
    for client in clients:
        _stream(client)
    _charges(rows, clients)
    held = [ticket.id for ticket in replay.scheduler.tickets.values()]
    assert not held, f"I6: neither ended nor known to a client: {held}"


def _transitions(log: Iterable[Entry]) -> None:
    """I3 one live lease, I5 contiguous tokens, I11 attempts grow and edges are legal, I12 nothing after the end."""
    state: dict[str, str] = {}
    attempts: dict[str, int] = {}
    indexes: defaultdict[tuple[str, int], int] = defaultdict(int)
    for entry in log:
        op = entry["op"]
        if entry["n"] == "1":
            state.clear()
        if op == "enqueue" and entry["verdict"] == "admitted":
            state[entry["id"]] = "waiting"
        elif op == "restore":
            state[entry["id"]] = "waiting"
            assert int(entry["attempt"]) > attempts.get(entry["id"], -1), f"I11: {entry['id']} goes back in attempts"
        elif op == "lease":
            for request_id, attempt in pairs(entry["leased"]):
                assert state[request_id] == "waiting", f"I3: {request_id} leased while {state[request_id]}"
                assert attempt > attempts.get(request_id, 0), f"I11: {request_id} attempt {attempt} again"
                state[request_id], attempts[request_id] = "running", attempt
        elif op == "emit":
            words = entry["tokens"].split()
            for i in range(0, len(words), 5):
                request_id, attempt, choice, first, count = words[i], *map(int, words[i + 1 : i + 5])
                assert state[request_id] == "running", f"I12: {request_id} emitted while {state[request_id]}"
                assert attempt == attempts[request_id], f"I3: {request_id} emitted by stale attempt {attempt}"
                # After a flush the client's count is the truth; what it had not been given is generated again.
                assert first <= indexes[request_id, choice], f"I5: {request_id} has a gap before token {first}"
                indexes[request_id, choice] = first + count
        elif op == "requeue" and entry["became"] == "waiting":
            assert state[entry["id"]] == "running", f"I11: {entry['id']} given back while {state[entry['id']]}"
            state[entry["id"]] = "waiting"
        elif op == "end":
            assert state[entry["id"]] in ("waiting", "running"), f"I1: {entry['id']} ended twice"
            state[entry["id"]] = "ended"


def _stream(client: Client) -> None:
    ends = [place for place, event in enumerate(client.events) if isinstance(event, RequestFinished)]
    assert len(ends) == 1, f"I1: {client.request_id} was given {len(ends)} ends"
    assert ends[0] == len(client.events) - 1, f"I4: {client.request_id} was given something after the end"
    for choice, expected in client.expected.items():
        index = 0
        for event in client.events:
            if is_output(event, choice):
                assert event.first_index == index, f"I5: {client.request_id} at token {index} was given {event.first_index}"
                index += len(produced(event))
        tokens = client.tokens(choice)
        whole = client.end.outcome == "succeeded"
        wanted = list(expected) if whole else list(expected)[: len(tokens)]
        assert tokens == wanted, f"I8: {client.request_id} was given tokens that are not its own"


def _charges(rows: list[Mapping[str, Any]], clients: list[Client]) -> None:
    counts = Counter(row["request_id"] for row in rows)
    assert max(counts.values(), default=1) == 1, f"I2: charged twice: {[k for k, n in counts.items() if n > 1]}"
    by_id = {row["request_id"]: row for row in rows}
    for client in clients:
        if (row := by_id.get(client.request_id)) is None:
            continue  # the row went with a flush
        given = sum(len(client.tokens(choice)) for choice in client.expected)
        assert row["completion_tokens"] == given, f"I7: {client.request_id} {row['completion_tokens']} charged, {given} given"


def longest_wait_ms(log: Iterable[Entry], priority: int) -> int:
    """I9: from enqueue to the first lease, in one class."""
    arrived: dict[str, int] = {}
    longest = 0
    for entry in log:
        if entry["op"] == "enqueue" and entry["verdict"] == "admitted" and int(entry["priority"]) == priority:
            arrived[entry["id"]] = int(entry["at"])
        elif entry["op"] == "lease":
            for request_id, _ in pairs(entry["leased"]):
                if (at := arrived.pop(request_id, None)) is not None:
                    longest = max(longest, int(entry["at"]) - at)
    return longest


def largest_service_difference(log: Iterable[Entry], one: str, other: str) -> tuple[float, float]:
    """I10: (largest difference of the service of two organizations since both were backlogged, dearest single request)."""
    org: dict[str, str] = {}
    cost: dict[str, float] = {}
    waiting: Counter[str] = Counter()
    served: defaultdict[str, float] = defaultdict(float)
    largest = dearest = 0.0
    for entry in log:
        if entry["op"] == "enqueue" and entry["verdict"] == "admitted":
            org[entry["id"]], cost[entry["id"]] = entry["org"], cost_of(entry).expected_ms / float(entry["weight"])
            waiting[entry["org"]] += 1
        elif entry["op"] == "lease":
            for request_id, _ in pairs(entry["leased"]):
                waiting[org[request_id]] -= 1
                if not (waiting[one] and waiting[other]):
                    served.clear()
                    continue
                served[org[request_id]] += cost[request_id]
                dearest = max(dearest, cost[request_id])
                largest = max(largest, abs(served[one] - served[other]))
    return largest, dearest
