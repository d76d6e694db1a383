"""Tools in plain words, for models whose chat template does not know them. The form is the one that Qwen was taught."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
_INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query. Their signatures are within <tools></tools>:
<tools>
{tools}
</tools>

To call a function, answer with its name and arguments as a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def in_words(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The conversation with roles and texts alone: tools in the system message, calls and their results in tags."""
    plain = list(_plain(messages))
    if not tools:
        return plain
    told = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def _plain(messages: Sequence[Message]) -> Iterator[Message]:
    """Results that follow each other are one message of the user's, since templates expect the roles to alternate."""
    results: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            results.append(f"<tool_response>\n{message['content']}\n</tool_response>")
            continue
        if results:
            yield {"role": "user", "content": "\n".join(results)}
            results = []
        calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
        words = [message["content"]] if message["content"] else []
        yield {"role": message["role"], "content": "\n".join([*words, *calls]) if calls else message["content"]}
    if results:
        yield {"role": "user", "content": "\n".join(results)}


def _call(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    spelled = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {spelled}}}\n</tool_call>'
