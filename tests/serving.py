"""Helpers of the tests of `dropflow serve`: pictures as clients send them, and a running server with its clients."""

from __future__ import annotations

import base64
import io
import json
import socket
from http.client import HTTPConnection
from typing import Any

import pytest
from PIL import Image

from dropflow_lab.inputs.data import Sample


def uri(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture as a data URI."""
    data = io.BytesIO()
    picture.save(data, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def asking(url: str, text: str) -> list[dict[str, Any]]:
    """Messages that ask about one picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def messages(sample: Sample) -> list[dict[str, Any]]:
    """Messages that ask a digits question."""
    (picture,) = sample.images()
    return asking(uri(picture), sample.question)


class Started:
    """A running server and its clients."""

    def __init__(self, server: Any) -> None:
        self.server, self.port = server, server.port
        self.openai = self.client()

    def client(self, key: str = "none", **options: Any) -> Any:
        """An official client."""
        import openai

        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60, **options
        )

    def ask(self, model: str, of: list[dict[str, Any]], **options: Any) -> str:
        """The text of an answer."""
        done = self.openai.chat.completions.create(model=model, messages=of, **options)
        return str(done.choices[0].message.content)

    def refused(self, **request: Any) -> Any:
        """The error that a request ends with."""
        import openai

        with pytest.raises(openai.APIStatusError) as caught:
            self.openai.chat.completions.create(**request)
        return caught.value

    def raw(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        """Status and body of a request made by hand."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, json.loads(data) if "json" in response.headers["content-type"] else data.decode()

    def socket(self) -> socket.socket:
        """An open connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)
