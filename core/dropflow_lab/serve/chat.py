"""The request of OpenAI's chat API, as far as a model of pictures and text can answer it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dropflow.errors import escaped
from dropflow_lab.serve.api_error import ApiError

_SHOWN_FAULTS = 5


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Model):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Model):
    """A picture, as `data:image/png;base64,...` or as a URL that the server may fetch."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted and ignored: the model's processor decides on the resolution."""


class ImagePart(_Model):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FileReference(_Model):
    """A picture that was uploaded before (`file_id`), or that comes along (`file_data`, as in `ImageUrl.url`)."""

    file_id: str | None = None
    file_data: str | None = None
    filename: str | None = None


class FilePart(_Model):
    """A picture in a message, as a file."""

    type: Literal["file"]
    file: FileReference


Part = Annotated[TextPart | ImagePart | FilePart, Field(discriminator="type")]


class Message(_Model):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(min_length=1)
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Accepted and ignored."""


class ResponseFormat(_Model):
    """The form of the answer: plain text."""

    type: Literal["text"]


class ChatRequest(_Model):
    """What `POST /v1/chat/completions` takes; what would change an answer and is not here is refused."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    """0, the default, answers greedily."""
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    logprobs: Literal[False] = False
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str]) -> list[str]:
        return [text for text in stop if text]

    @property
    def asked_tokens(self) -> int | None:
        """Length of the answer that the client asks for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


def read_request(body: bytes) -> ChatRequest:
    """Return the request in a body of JSON; raises `ApiError` (400) naming every wrong entry."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"expected a JSON object: {escaped(error)}") from None
    if not isinstance(data, dict):
        raise ApiError(400, "invalid_json", f"expected a JSON object, got {type(data).__name__}")
    given = {name: value for name, value in data.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ApiError(400, "invalid_json", "expected a chat request, got JSON that is nested too deeply") from None
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [_fault(fault["loc"], fault["type"], fault["msg"]) for fault in faults]
        more = [f"and {len(lines) - _SHOWN_FAULTS} more"] if len(lines) > _SHOWN_FAULTS else []
        first = _path(faults[0]["loc"])
        raise ApiError(400, "invalid_value", "; ".join(lines[:_SHOWN_FAULTS] + more), first) from None


def _path(where: tuple[int | str, ...]) -> str:
    return escaped(".".join(map(str, where)))


def _fault(where: tuple[int | str, ...], kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{_path(where)}: not supported by this server, leave it out"
    return f"{_path(where)}: {escaped(message[0].lower() + message[1:])}"
