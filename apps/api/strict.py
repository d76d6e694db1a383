"""What every body's schema is made of."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field

from apps.core.errors import InvalidRequest


def _no_nul(value: Any) -> Any:
    if isinstance(value, str) and "\0" in value:
        raise ValueError("holds a NUL character")
    if isinstance(value, str) and ("\ue0f0" in value or "\ue0f1" in value):
        raise ValueError("holds U+E0F0 or U+E0F1, which are reserved here")
    return value


Text = Annotated[str, BeforeValidator(_no_nul)]
Number = Annotated[float, Field(allow_inf_nan=False, strict=False)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    ignored: ClassVar[frozenset[str]] = frozenset()  # accepted and without effect here; docs/api/ lists them


def by_type(*types: str, default: str = "") -> Discriminator:
    """Tells the members of a union apart by their `type`. A member's tag is its type in capitals: image_url is ImageUrl."""

    def tag(value: Any) -> str:
        name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return "".join(part.capitalize() for part in str(default if name is None else name).split("_"))

    return Discriminator(tag, custom_error_type="unknown_type", custom_error_message=f"is one of {', '.join(types)}")


def invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value", param=param)


def unsupported(param: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is not supported here.", code="unsupported_parameter", param=param)
