"""From a choice's text to what a client is shown of it: reasoning, content and tool calls. Pure; text may be cut anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace

from apps.core.types import OutputForm, Thought, ToolCallDelta

_THINK, _END_THINK = "<think>", "</think>"
_CALL, _END_CALL = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{"name": "([^"\n]*)", "arguments": ')


@dataclass(frozen=True, slots=True)
class Parts:
    """What a piece of text was."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class OutputParser:
    """One choice's. `num_calls` counts the calls that are complete."""

    def __init__(self, form: OutputForm, call_id: str) -> None:
        """The ids of calls are `call_id` and a number, so that a replay names them alike."""
        self._form = form
        self._call_id = call_id
        self._step = {Thought.NONE: self._content, Thought.EXPECTED: self._opening, Thought.BEGUN: self._thought}[form.thought]
        self._text = ""
        self._trims = form.thought is not Thought.NONE  # line breaks after a tag are the form's, not the answer's
        self._at_end = False
        self._parts = Parts()
        self._calls = 0
        self._arguments = ""
        self.num_calls = 0

    @property
    def is_thinking(self) -> bool:
        return self._step == self._thought

    def push(self, text: str, *, at_end: bool = False) -> Parts:
        """What the text makes visible. At the end, what was held because a tag might have begun shows as what it is."""
        if self._step == self._content and not (self._form.tool_calls or self._trims):
            return Parts(text)
        self._text += text
        self._at_end = at_end
        self._parts = Parts()
        while self._step():
            continue
        return self._parts

    # Each step takes what it can from the text. True when another step may have more to take.

    def _opening(self) -> bool:
        begin = self._text.lstrip()
        if begin.startswith(_THINK):
            self._text = begin[len(_THINK) :]
            self._step = self._thought
            return True
        if _THINK.startswith(begin) and not self._at_end:
            return False
        self._step = self._content
        self._trims = False
        return True

    def _thought(self) -> bool:
        if self._trims:
            self._text = self._text.lstrip("\n")
        text, found = self._until(_END_THINK)
        self._trims = self._trims and not text
        self._parts = replace(self._parts, reasoning=self._parts.reasoning + text)
        if found:
            self._step, self._trims = self._content, True
        return found

    def _content(self) -> bool:
        if self._trims:
            self._text = self._text.lstrip("\n")
        text, found = self._until(_CALL) if self._form.tool_calls else (self._text, False)
        if not self._form.tool_calls:
            self._text = ""
        self._trims = self._trims and not text
        self._parts = replace(self._parts, content=self._parts.content + text)
        if found:
            self._step = self._head
        return found

    def _head(self) -> bool:
        if (match := _HEAD.match(self._text)) is None:
            return False
        self._text = self._text[match.end() :]
        self._add(ToolCallDelta(self._calls, id=f"{self._call_id}{self._calls}", name=match[1]))
        self._step, self._arguments = self._body, ""
        return True

    def _body(self) -> bool:
        """A call's JSON has no line breaks; its last bracket is the call's, not the arguments'."""
        line, end, rest = self._text.partition("\n")
        if end:
            piece, self._text, self._step = line.removesuffix("}"), rest, self._end
        elif line.endswith("}") and not (self._at_end and not _is_json(self._arguments + line[:-1])):
            piece, self._text = line[:-1], "" if self._at_end else "}"
        else:
            piece, self._text = line, ""
        if piece:
            self._arguments += piece
            self._add(ToolCallDelta(self._calls, arguments=piece))
        return bool(end)

    def _end(self) -> bool:
        _, found, rest = self._text.partition(_END_CALL)
        if found:
            self._text, self._step, self._trims = rest, self._content, True
            self._calls += 1
            self.num_calls += 1
        return bool(found)

    def _until(self, tag: str) -> tuple[str, bool]:
        """The text before a tag, taken, and whether the tag was there. Blanks are held with what may begin the tag."""
        before, found, rest = self._text.partition(tag)
        if found:
            self._text = rest
            return before.rstrip(), True
        keep = 0 if self._at_end else _undecided(before, tag)
        shown = before[: len(before) - keep]
        if not self._at_end:
            shown = shown.rstrip()
        self._text = before[len(shown) :]
        return shown, False

    def _add(self, call: ToolCallDelta) -> None:
        """One entry a call and push, as clients expect."""
        *others, last = self._parts.calls or (None,)
        if last is not None and last.index == call.index:
            merged = [*others, replace(last, arguments=last.arguments + call.arguments)]
        else:
            merged = [*self._parts.calls, call]
        self._parts = replace(self._parts, calls=tuple(call for call in merged if call is not None))


def _undecided(text: str, tag: str) -> int:
    """Length of the longest end of the text that the tag begins with."""
    lengths = range(min(len(text), len(tag) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(tag[:length])), 0)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
