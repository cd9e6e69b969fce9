"""Turns a request's messages into a conversation with opened pictures."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from dropflow_lab.errors import InputError
from dropflow_lab.inputs.images import decode_image
from dropflow_lab.serve.api_error import ApiError
from dropflow_lab.serve.chat import FilePart, Message, Part, TextPart
from dropflow_lab.serve.fetch import fetch
from dropflow_lab.serve.limits import Limits
from dropflow_lab.serve.uploads import Uploads

_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_PUT_IT = "send it as data:image/png;base64,... or upload it first (POST /v1/files)"


def open_conversation(
    messages: Sequence[Message], owner: str, uploads: Uploads, limits: Limits
) -> list[dict[str, Any]]:
    """Return the messages as a chat template takes them, every picture opened.

    Raises `ApiError` (400, or 404 for a file that is not there) naming the part that is wrong.
    """
    pictures = sum(not isinstance(part, TextPart) for message in messages for part in message.content)
    if pictures > limits.images:
        raise ApiError(
            400, "too_many_images", f"expected up to {limits.images} pictures in a request, got {pictures}", "messages"
        )
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": [
                _opened(part, f"messages.{i}.content.{j}", owner, uploads, limits)
                for j, part in enumerate(message.content)
            ],
        }
        for i, message in enumerate(messages)
    ]


def _opened(part: Part, where: str, owner: str, uploads: Uploads, limits: Limits) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    try:
        data = _of_file(part, owner, uploads) if isinstance(part, FilePart) else _of_url(part.image_url.url, limits)
        return {"type": "image", "image": _decoded(data, limits)}
    except ApiError as error:
        raise ApiError(error.status, error.code, f"{where}: {error.message}", where) from None


def _of_file(part: FilePart, owner: str, uploads: Uploads) -> bytes:
    if (part.file.file_id is None) == (part.file.file_data is None):
        raise ApiError(400, "invalid_image", f"expected either file_id or file_data of a picture; {_PUT_IT}")
    if part.file.file_id is not None:
        return uploads.get(owner, part.file.file_id).data
    return _inline(part.file.file_data or "")


def _of_url(url: str, limits: Limits) -> bytes:
    if re.match(r"https?:", url, re.IGNORECASE):
        return fetch(url, limits.hosts, limits.body_bytes)
    return _inline(url)


def _inline(url: str) -> bytes:
    start = _DATA.match(url)
    if start is None:
        raise ApiError(400, "invalid_image", f"expected a picture as data:image/...;base64,...; {_PUT_IT}")
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", f"the picture is not valid base64; {_PUT_IT}") from None


def _decoded(data: bytes, limits: Limits) -> Image.Image:
    try:
        return decode_image(data, limits.pixels)
    except InputError as error:
        raise ApiError(400, "invalid_image", str(error)) from None
