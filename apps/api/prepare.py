"""From a validated body to an InferenceRequest: the model found, the prompt in tokens, every bound checked."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from apps.api import pictures
from apps.api.grammar import AnswerForm, check
from apps.api.messages import conversation
from apps.api.pictures import Picture
from apps.api.schemas import ChatRequest, CompletionRequest, Sampling
from apps.core.blobs import key_of
from apps.core.errors import InvalidRequest, NotFound, PermissionDenied
from apps.core.types import InferenceRequest, OutputForm, Principal, Priority, SamplingParams, Thought
from apps.fleet.selectors import ModelCard, model_cards
from apps.fleet.tokenizers import ModelTokenizer, tokenizer_for
from apps.scheduler import services

# No vocabulary here has tokens of more bytes than this on average over a whole prompt: longer text cannot fit.
MAX_BYTES_PER_TOKEN = 64
INLINE_CHARACTERS = 4_000  # shorter text is tokenised on the spot, faster than a thread could be told
TEXT_MODALITIES = frozenset({"text", "vision"})


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to submit, with what is needed to answer it. `attachments` are its blobs, by their keys."""

    request: InferenceRequest
    card: ModelCard
    tokenizer: ModelTokenizer
    tier: str
    attachments: Mapping[str, bytes] = field(default_factory=dict)


async def chat(body: ChatRequest, principal: Principal, prefix: str = "chatcmpl-") -> Prepared:
    """`prefix` begins the request's id. Raises NotFound, InvalidRequest, PermissionDenied or Unavailable."""
    card = await _find_speaker(body.model, principal)
    tokenizer = tokenizer_for(card.name)
    messages = conversation(body.messages)
    shown = await _pictures(body, card)
    sizes = tokenizer.picture_sizes
    seen = [sizes.tokens(picture.width, picture.height, picture.bound) for picture in shown] if sizes else []
    tools = [tool.plain for tool in body.offered]
    characters = sum(message.characters for message in body.messages) + len(json.dumps(tools))
    _require_room_for_text(characters, card, body)
    thinking = _thinking(body, card, tokenizer)
    prompt = await _encode(lambda: tokenizer.encode_chat(messages, tools, thinking, seen), characters)
    thought = tokenizer.thought_after(prompt, thinking)
    grammar = await _grammar(body, tokenizer, thought)
    prepared = _prepare(body, principal, card, tokenizer, [prompt], body.token_limit, body.top, prefix)
    sampling = replace(prepared.request.sampling, grammar=grammar)
    request = replace(
        prepared.request,
        sampling=sampling,
        form=OutputForm(thought, tool_calls=bool(tools)),
        blobs=tuple(key_of(picture.data) for picture in shown),
        picture_pixels=tuple(picture.bound for picture in shown),
        image_tokens=sum(seen),
    )
    attachments = dict(zip(request.blobs, (picture.data for picture in shown), strict=True))
    return replace(prepared, request=request, attachments=attachments)


async def _pictures(body: ChatRequest, card: ModelCard) -> list[Picture]:
    """Those of the messages. Raises InvalidRequest for one that is refused, and for any where the model does not see."""
    param = next((param for param, _ in pictures.found(body.messages)), None)
    if param is None:
        return []
    if card.modality != "vision":
        raise InvalidRequest(f"{param}: {card.name} takes no images.", code="unsupported_parameter", param=param)
    return await asyncio.to_thread(pictures.read_all, body.messages)


def _thinking(body: ChatRequest, card: ModelCard, tokenizer: ModelTokenizer) -> bool | None:
    """What the chat template is told. Raises InvalidRequest for what the model cannot do."""
    wanted = body.thinking
    if wanted is None:
        return None
    param = "chat_template_kwargs.enable_thinking" if body.reasoning_effort is None else "reasoning_effort"
    if wanted and not tokenizer.thinks:
        raise InvalidRequest(f"{param}: {card.name} does not think.", code="unsupported_parameter", param=param)
    if not wanted and tokenizer.thinks and not tokenizer.can_switch_thinking:
        message = f"{param}: {card.name} thinks in any case."
        raise InvalidRequest(message, code="unsupported_parameter", param=param)
    return wanted if tokenizer.thinks else None


async def _grammar(body: ChatRequest, tokenizer: ModelTokenizer, thought: Thought) -> str:
    """What the answer must follow; empty for free text. Raises InvalidRequest for what cannot be enforced."""
    schema = body.response_format.schema_to_follow if body.response_format else None
    callable_tools = body.callable
    form = AnswerForm(
        schema=schema,
        functions=[(tool.function.name, tool.function.schema_to_follow) for tool in callable_tools],
        must_call=body.must_call,
        max_calls=body.max_calls,
        thought=thought,
    )
    if form.is_free:
        return ""
    if body.ignore_eos:
        raise InvalidRequest(
            "ignore_eos: an answer that follows a form ends with it.", code="unsupported_parameter", param="ignore_eos"
        )
    params = [] if schema is None else ["response_format.json_schema.schema"]
    offered = list(body.tools or ())
    params += [f"tools[{offered.index(tool)}].function.parameters" for tool in callable_tools]
    await check(form, params)
    return form.lark(tokenizer.tags)


async def completion(body: CompletionRequest, principal: Principal) -> Prepared:
    """Raises NotFound, InvalidRequest, PermissionDenied or Unavailable."""
    card = await _find_speaker(body.model, principal)
    tokenizer = tokenizer_for(card.name)
    prompts = [await _prompt(prompt, card, tokenizer, body) for prompt in body.prompts]
    return _prepare(body, principal, card, tokenizer, prompts, body.token_limit, body.top, "cmpl-")


async def _prompt(prompt: str | list[int], card: ModelCard, tokenizer: ModelTokenizer, body: Sampling) -> list[int]:
    if isinstance(prompt, str):
        _require_room_for_text(len(prompt), card, body)
        ids = await _encode(lambda: tokenizer.encode(prompt), len(prompt))
        return ids or [min(tokenizer.eos_ids)]  # an empty prompt starts where a text ends
    if max(prompt) >= tokenizer.vocab_size:
        raise InvalidRequest("prompt: holds a token id the model does not have.", code="invalid_value", param="prompt")
    if tokenizer.picture_token in prompt:
        raise InvalidRequest("prompt: holds a token that stands for an image.", code="invalid_value", param="prompt")
    return prompt


async def _encode(encode: Callable[[], list[int]], characters: int) -> list[int]:
    return encode() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(encode)


async def find_model(
    name: str, principal: Principal, modalities: Collection[str] = TEXT_MODALITIES, purpose: str = "chat or completions"
) -> ModelCard:
    """Raises NotFound: for an unknown model, one the key may not use, and one that is not for this."""
    card = (await model_cards()).get(name)
    if card is None or (principal.allowed_models is not None and name not in principal.allowed_models):
        raise NotFound(
            f"The model {name[:100]!r} does not exist or you may not use it. GET /v1/models lists yours.",
            code="model_not_found",
            param="model",
        )
    if card.modality not in modalities:
        message = f"{name} is a model for {card.modality}, not for {purpose}."
        raise NotFound(message, code="model_not_found", param="model")
    return card


async def _find_speaker(name: str, principal: Principal) -> ModelCard:
    """As `find_model`, with the context that its workers have. Raises Unavailable too."""
    card = await find_model(name, principal)
    return replace(card, context_length=await services.context_length(card))


def _require_room_for_text(characters: int, card: ModelCard, body: Sampling) -> None:
    """Refuses, before any tokeniser runs, text that no vocabulary could fit into the context."""
    if characters > card.context_length * MAX_BYTES_PER_TOKEN:
        raise _too_long(card, f"more than {card.context_length}", body.max_tokens or 1)


def _too_long(card: ModelCard, prompt: str, completion: int) -> InvalidRequest:
    return InvalidRequest(
        f"The context of {card.name} is {card.context_length} tokens. "
        f"You asked for {prompt} in the prompt and {completion} in the completion.",
        code="context_length_exceeded",
        param="messages",
    )


def _prepare(
    body: Sampling,
    principal: Principal,
    card: ModelCard,
    tokenizer: ModelTokenizer,
    prompts: list[list[int]],
    token_limit: int | None,
    top: int | None,
    prefix: str,
) -> Prepared:
    priority = class_of(body.priority, principal)
    longest = max(map(len, prompts))
    max_tokens = max(1, card.context_length - longest) if token_limit is None else token_limit
    if longest + max_tokens > card.context_length:
        raise _too_long(card, str(longest), max_tokens)
    request = InferenceRequest(
        id=f"{prefix}{secrets.token_hex(12)}",
        org_id=principal.org_id,
        key_id=principal.key_id,
        model=card.name,
        prompts=tuple(map(tuple, prompts)),
        sampling=_sampling(body, tokenizer, max_tokens, top),
        n=body.n or 1,
        priority=priority,
        weight=principal.weight,
        stream=bool(body.stream),
    )
    return Prepared(request, card, tokenizer, priority.name.lower())


def class_of(asked: Priority | None, principal: Principal) -> Priority:
    """The class a request is served in. Raises PermissionDenied for one above the plan's."""
    priority = principal.priority if asked is None else asked
    if priority > principal.max_priority:
        message = f"Your plan does not include the service tier {priority.name.lower()}."
        raise PermissionDenied(message, code="priority_not_allowed", param="service_tier")
    return priority


def _sampling(body: Sampling, tokenizer: ModelTokenizer, max_tokens: int, top: int | None) -> SamplingParams:
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    return SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.biases(tokenizer.vocab_size),
        top_logprobs=top,
        stop=body.stops,
        ignore_eos=bool(body.ignore_eos),
    )
