"""What strangers send, and the exact answer: (name, what to send, status, code, param). Data; test_bad_input.py sends it.

`body` is a change to a good chat request (None removes a field), `raw` replaces the whole body, `endpoint` the address.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.hostile_schemas import REFUSED
from tests.pictures import BOMBS, data_url, picture

SEEING = "qwen2.5-vl-3b"


@dataclass(frozen=True)
class Bad:
    name: str
    status: int
    code: str
    param: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    method: str = "POST"
    endpoint: str = "/v1/chat/completions"


def value(name: str, status: int = 400, code: str = "invalid_value", *, param: str, **body: Any) -> Bad:
    return Bad(name, status, code, param, body=body)


USER = {"role": "user", "content": "hi"}
CREDENTIALS = [
    Bad("no key", 401, "missing_api_key", headers={"Authorization": None}),
    Bad("basic", 401, "invalid_api_key", headers={"Authorization": "Basic x"}),
    Bad("bearer alone", 401, "invalid_api_key", headers={"Authorization": "Bearer"}),
    Bad("sql", 401, "invalid_api_key", headers={"Authorization": "Bearer ' OR 1=1--"}),
    Bad("shell", 401, "invalid_api_key", headers={"Authorization": "Bearer $(id)"}),
    Bad("8 KiB key", 401, "invalid_api_key", headers={"Authorization": "Bearer sk-" + "a" * 8000}),
    Bad("unknown key", 401, "invalid_api_key", headers={"Authorization": "Bearer sk-" + "a" * 43}),
    Bad("key in the address", 401, "missing_api_key", headers={"Authorization": None},
        endpoint="/v1/chat/completions?api_key=sk-secret"),
]  # fmt: skip
ADDRESSES = [
    Bad("unknown path", 404, "not_found", endpoint="/v1/nothing"),
    Bad("root of the API", 404, "not_found", endpoint="/v1"),
    Bad("doubled slashes", 404, "not_found", endpoint="/v1//chat/completions"),
    Bad("other host", 400, "invalid_host", headers={"Host": "evil.example"}),
    Bad("put", 405, "method_not_allowed", method="PUT"),
    Bad("get", 405, "method_not_allowed", method="GET"),
    Bad("delete of a model", 405, "method_not_allowed", method="DELETE", endpoint="/v1/models/smollm2-135m"),
    Bad("unknown model's page", 404, "model_not_found", "model", method="GET", endpoint="/v1/models/%2e%2e%2fetc%2fpasswd"),
]
BODIES = [
    Bad("text/plain", 415, "unsupported_media_type", headers={"Content-Type": "text/plain"}),
    Bad("multipart", 415, "unsupported_media_type", headers={"Content-Type": "multipart/form-data; boundary=x"}),
    Bad("no type", 415, "unsupported_media_type", headers={"Content-Type": None}),
    Bad("gzip", 415, "unsupported_encoding", headers={"Content-Encoding": "gzip"}),
    Bad("empty", 400, "invalid_json", raw=b""),
    Bad("half", 400, "invalid_json", raw=b"{"),
    Bad("null", 400, "invalid_request", raw=b"null"),
    Bad("list", 400, "invalid_request", raw=b"[]"),
    Bad("string", 400, "invalid_request", raw=b'"x"'),
    Bad("duplicate name", 400, "invalid_json", raw=b'{"model":"a","model":"b"}'),
    Bad("NaN", 400, "invalid_json", raw=b'{"temperature":NaN}'),
    Bad("Infinity", 400, "invalid_json", raw=b'{"temperature":Infinity}'),
    Bad("5,000 digits", 400, "invalid_json", raw=b'{"seed":' + b"9" * 5000 + b"}"),
    Bad("depth 100,000", 400, "invalid_json", raw=b"[" * 100_000),
    Bad("invalid UTF-8", 400, "invalid_json", raw=b'{"model":"\xff"}'),
    Bad("lone surrogate", 400, "invalid_json", raw=b'{"model":"\\ud800"}'),
    Bad("1 MiB and one byte", 413, "payload_too_large", raw=b" " * ((1 << 20) + 1), endpoint="/v1/completions"),
    Bad("36 MiB and one byte", 413, "payload_too_large", raw=b" " * ((36 << 20) + 1)),
    Bad("36 MiB of quotes", 400, "invalid_json", raw=b'"' * (36 << 20)),
    Bad("36 MiB of objects", 400, "invalid_json", raw=b'{"a":[' + b"{}," * (11 << 20) + b"{}]}"),
    Bad("2 MiB of brackets", 400, "invalid_json", raw=b"[]" * (1 << 20)),
]
FIELDS = [
    Bad("unknown field", 400, "unsupported_parameter", "tp_size", body={"tp_size": 2}),
    Bad("a peer's field", 400, "unsupported_parameter", "chat_template", body={"chat_template": "{{ 1 }}"}),
    Bad("read-only field", 400, "unsupported_parameter", "cost", body={"cost": 0}),
    Bad("best_of", 400, "unsupported_parameter", "best_of", body={"best_of": 2}),
    Bad("unknown model", 404, "model_not_found", "model", body={"model": "gpt-5"}),
    Bad("path as model", 404, "model_not_found", "model", body={"model": "../../etc/passwd"}),
    Bad("10 KiB model", 404, "model_not_found", "model", body={"model": "m" * 10_000}),
    Bad("homoglyph model", 404, "model_not_found", "model", body={"model": "smollm2-135м"}),
    Bad("NUL in model", 404, "model_not_found", "model", body={"model": "smollm2-135m\0"}),
    Bad("no model", 400, "missing_required_parameter", "model", body={"model": None}),
    Bad("priority above the plan", 403, "priority_not_allowed", "service_tier", body={"service_tier": "priority"}),
    value("tier", param="service_tier", service_tier="high"),
    *(value(f"max_tokens {bad!r}", param="max_tokens", max_tokens=bad) for bad in (0, -1, 1.5, "10", True, 2**31, 2**63)),
    value("context", code="context_length_exceeded", param="messages", max_tokens=8190),
    *(value(f"n {bad!r}", param="n", n=bad) for bad in (0, 10**9, "2")),
    *(value(f"temperature {bad!r}", param="temperature", temperature=bad) for bad in (-1, 3, "hot")),
    *(value(f"top_p {bad!r}", param="top_p", top_p=bad) for bad in (0, 1.1, -1)),
    value("top_k", param="top_k", top_k=-5),
    *(value(f"stop {name}", param="stop", stop=bad)
      for name, bad in (("many", ["x"] * 10_000), ("empty", ""), ("number", 5), ("long", "x" * 65))),
    value("empty stop in a list", param="stop[0]", stop=[""]),
    value("logit_bias 1e5", param="logit_bias", logit_bias={str(i): 1 for i in range(5_000)}),
    value("logit_bias id", param="logit_bias", logit_bias={"49152": 1}),
    value("logit_bias negative id", param="logit_bias", logit_bias={"-1": 1}),
    value("logit_bias value", param="logit_bias", logit_bias={"1": 1000}),
    value("logprobs number", param="logprobs", logprobs=1_000_000),
    value("top_logprobs", param="top_logprobs", logprobs=True, top_logprobs=21),
    value("top_logprobs alone", param="top_logprobs", top_logprobs=2),
    *(value(f"seed {bad!r}", param="seed", seed=bad) for bad in (2**64, 1.5, "x")),
    value("no messages", param="messages", messages=[]),
    value("10,000 messages", param="messages", messages=[USER] * 10_000),
    value("role", param="messages[1].role", messages=[USER, {"role": "root", "content": "x"}]),
    value("no role", code="missing_required_parameter", param="messages[0].role", messages=[{"content": "x"}]),
    value("content null", param="messages[0].content", messages=[{"role": "user", "content": None}]),
    value("content number", param="messages[0].content", messages=[{"role": "user", "content": 5}]),
    value("NUL in text", param="messages[0].content", messages=[{"role": "user", "content": "a\0b"}]),
    value("1 million characters", code="context_length_exceeded", param="messages",
          messages=[{"role": "user", "content": "a" * 1_000_000}]),
    value("300,000 combining marks", code="context_length_exceeded", param="messages",
          messages=[{"role": "user", "content": "e" + "\u0301" * 300_000}]),
    value("image", code="unsupported_parameter", param="messages[0].content[0].image_url",
          messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]),
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "g"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SCHEMA = "response_format.json_schema.schema"


def schema(name: str, wanted: Any) -> Bad:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": wanted}}
    return value(name, code="invalid_schema", param=SCHEMA, response_format=form)


FORMS = [
    value("no tools", param="tools", tools=[]),
    value("129 tools", param="tools", tools=[TOOL] * 129),
    value("two tools of one name", param="tools", tools=[TOOL, TOOL]),
    value("custom tool", param="tools[0].type", tools=[{**TOOL, "type": "custom"}]),
    value("tool's name", param="tools[0].function.name", tools=[{"type": "function", "function": {"name": "a b"}}]),
    value("no function", code="missing_required_parameter", param="tools[0].function", tools=[{"type": "function"}]),
    value("unknown field of a tool", code="unsupported_parameter", param="tools[0].function.code",
          tools=[{"type": "function", "function": {"name": "f", "code": "x"}}]),
    value("tool's schema", code="invalid_schema", param="tools[1].function.parameters",
          tools=[TOOL, {"type": "function", "function": {"name": "g", "parameters": {"type": "object", "properties": 5}}}]),
    value("arguments that are no object", code="invalid_schema", param="tools[0].function.parameters",
          tools=[{"type": "function", "function": {"name": "g", "parameters": {"type": "string"}}}]),
    value("choice without tools", param="tool_choice", tool_choice="required"),
    value("choice of nothing", param="tool_choice", tools=[TOOL], tool_choice="any"),
    value("choice of another", param="tool_choice", tools=[TOOL], tool_choice=NAMED),
    value("format", param="response_format.type", response_format={"type": "yaml"}),
    value("format without a schema", param="response_format.json_schema", response_format={"type": "json_schema"}),
    value("schema without its type", param="response_format.json_schema",
          response_format={"type": "json_object", "json_schema": {"name": "x", "schema": {}}}),
    value("schema without a name", code="missing_required_parameter", param="response_format.json_schema.name",
          response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
    value("form and ignore_eos", code="unsupported_parameter", param="ignore_eos", ignore_eos=True,
          response_format={"type": "json_object"}),
    *(schema(f"schema: {name}", wanted) for name, wanted in REFUSED.items()),
    value("a model that does not think", code="unsupported_parameter", param="chat_template_kwargs.enable_thinking",
          chat_template_kwargs={"enable_thinking": True}),
    value("effort without thought", code="unsupported_parameter", param="reasoning_effort", reasoning_effort="low"),
    value("effort", param="reasoning_effort", reasoning_effort="heroic"),
    value("effort against itself", param="reasoning_effort", reasoning_effort="none",
          chat_template_kwargs={"enable_thinking": True}),
    value("other options of the template", code="unsupported_parameter", param="chat_template_kwargs.tools",
          chat_template_kwargs={"tools": []}),
    value("result of no call", param="messages[1].tool_call_id",
          messages=[USER, {"role": "tool", "tool_call_id": "c1", "content": "x"}]),
    value("result without an id", param="messages[1].tool_call_id", messages=[USER, {"role": "tool", "content": "x"}]),
    value("calls of the user", param="messages[0].tool_calls", messages=[{**USER, "tool_calls": [CALL]}]),
    value("thoughts of the user", param="messages[0].reasoning_content", messages=[{**USER, "reasoning_content": "x"}]),
    value("call without an id", code="missing_required_parameter", param="messages[1].tool_calls[0].id",
          messages=[USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL["function"]}]}]),
    value("answer of nothing", param="messages[1].content", messages=[USER, {"role": "assistant", "content": None}]),
    Bad("completions have no tools", 400, "unsupported_parameter", "tools", endpoint="/v1/completions",
        body={"messages": None, "prompt": "x", "tools": [TOOL]}),
]  # fmt: skip


def response(name: str, param: str, code: str = "invalid_value", status: int = 400, **body: Any) -> Bad:
    """A row for /v1/responses: what is sent beside a good `input`."""
    good = {"messages": None, "max_tokens": None, "input": "hi", "max_output_tokens": 1}
    return Bad(f"response: {name}", status, code, param, body={**good, **body}, endpoint="/v1/responses")


UNSUPPORTED = "unsupported_parameter"
FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
DATA_URL = "data:image/png;base64,iVBORw0KGgo="
RESPONSES = [
    *(response(name, name, UNSUPPORTED, **{name: value})
      for name, value in (("conversation", "c"), ("prompt", {"id": "p"}), ("context_management", []), ("moderation", {}),
                          ("image", {}), ("messages", [USER]), ("max_tokens", 1), ("stop", "x"), ("verbosity", "low"))),
    response("no input", "input", "missing_required_parameter", input=None),
    response("no items", "input", input=[]),
    response("number as input", "input", input=5),
    response("background", "background", background=True),
    response("truncation", "truncation", truncation="auto"),
    response("other include", "include[0]", include=["web_search_call.results"]),
    response("no tokens", "max_output_tokens", max_output_tokens=0),
    response("context", "input", "context_length_exceeded", max_output_tokens=8190),
    response("no calls", "max_tool_calls", max_tool_calls=0),
    response("summary", "reasoning.summary", reasoning={"summary": "detailed"}),
    response("effort without thought", "reasoning.effort", UNSUPPORTED, reasoning={"effort": "high"}),
    response("17 metadata", "metadata", metadata={str(i): "x" for i in range(17)}),
    response("long metadata", "metadata.a", metadata={"a": "x" * 513}),
    response("long cache key", "prompt_cache_key", prompt_cache_key="x" * 65),
    response("hosted tool", "tools[0].type", tools=[{"type": "web_search"}]),
    response("chat's tool", "tools[0].name", "missing_required_parameter", tools=[{"type": "function"}]),
    response("tool's schema", "tools[0].parameters", "invalid_schema",
             tools=[{**FUNCTION, "parameters": {"type": "object", "properties": 5}}]),
    response("choice of another", "tool_choice", tools=[FUNCTION], tool_choice={"type": "function", "name": "g"}),
    response("choice of nothing", "tool_choice", tools=[FUNCTION], tool_choice={"type": "mcp"}),
    response("format", "text.format.type", text={"format": {"type": "yaml"}}),
    response("schema", "text.format.schema", "invalid_schema",
             text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": 5}}}),
    response("unknown item", "input[0].type", input=[{"type": "web_search_call", "id": "x"}]),
    response("unknown field of an item", "input[0].x", UNSUPPORTED, input=[{**USER, "x": 1}]),
    response("unknown part", "input[0].content[0].type", input=[{"role": "user", "content": [{"type": "input_file"}]}]),
    response("role", "input[0].role", input=[{"role": "tool", "content": "x"}]),
    response("result of no call", "input[1].call_id",
             input=[USER, {"type": "function_call_output", "call_id": "c", "output": "x"}]),
    response("reference to nothing", "input[0].id", input=[{"type": "item_reference", "id": "msg_x"}]),
    response("image for a blind model", "input[0].content[0].image_url", UNSUPPORTED,
             input=[{"role": "user", "content": [{"type": "input_image", "image_url": DATA_URL}]}]),
    response("no such response before", "previous_response_id", "previous_response_not_found", 404,
             previous_response_id="resp_x"),
    response("NUL", "input", input="a\0b"),
    Bad("response: page", 404, "not_found", method="GET", endpoint="/v1/responses/resp_x/input_items"),
    Bad("response: put", 405, "method_not_allowed", method="PUT", endpoint="/v1/responses/resp_x"),
    Bad("compaction without a model", 400, "missing_required_parameter", "model", raw=b'{"input": "x"}',
        endpoint="/v1/responses/compact"),
]  # fmt: skip
KEYS = [
    Bad("idempotency key of 256", 400, "invalid_value", "Idempotency-Key", headers={"Idempotency-Key": "k" * 256}),
    Bad("empty idempotency key", 400, "invalid_value", "Idempotency-Key", headers={"Idempotency-Key": ""}),
    Bad("no such session", 404, "not_found", method="GET", endpoint="/v1/sessions/none"),
    Bad("deleting no session", 404, "not_found", method="DELETE", endpoint="/v1/sessions/none"),
    Bad("post to a key", 405, "method_not_allowed", endpoint="/v1/key"),
    value("long session", param="session_id", session_id="x" * 65),
    value("session of a number", param="session_id", session_id=5),
    value("part of a message", param="messages[0].content[0].type",
          messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
]  # fmt: skip
IMAGE = "messages[0].content[0].image_url"


def image(name: str, address: str, code: str = "invalid_image", count: int = 1, param: str = IMAGE) -> Bad:
    """Images in a chat with a model that sees."""
    part = {"type": "image_url", "image_url": {"url": address}}
    return value(name, code=code, param=param, model=SEEING, messages=[{"role": "user", "content": [part] * count}])


IMAGES = [
    *(image(f"image: {name}", data_url(data)) for name, data in BOMBS.items()),
    *(image(f"image at {address}", address, "invalid_image_url")
      for address in ("http://169.254.169.254/", "file:///etc/passwd", "http://[::ffff:127.0.0.1]/", "http://a\\@b/x.png")),
    image("image that is no base64", "data:image/png;base64,$$$$"),
    image("17 images", data_url(picture()), "too_many_images", 17, "messages[0].content[16].image_url"),
    image("10,000 images", data_url(picture()), "invalid_value", 10_000, "messages[0].content"),
    image("10 MiB and a bit", "data:image/png;base64," + "A" * (14 << 20), "image_too_large"),
    image("images beyond the context", data_url(picture(4000, 4000)), "context_length_exceeded", 3, "messages"),
]  # fmt: skip
BAD = [*CREDENTIALS, *ADDRESSES, *BODIES, *FIELDS, *FORMS, *RESPONSES, *KEYS, *IMAGES]
