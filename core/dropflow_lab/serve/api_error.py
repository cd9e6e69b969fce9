"""What a client is told when its request fails, in the form that OpenAI's API gives errors."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request fails with an HTTP status; the client gets message, code and the parameter that is wrong."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        """`code` is for programs, `message` for people; `param` is a path in the request's JSON."""
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def internal_error() -> ApiError:
    """Return the error for a fault of the server, whose details stay in the server's log."""
    return ApiError(500, "internal_error", "the model failed on this request; the server's log says why")


def stopping() -> ApiError:
    """Return the error for a request that a stop of the server cuts short."""
    return ApiError(503, "stopping", "the server is stopping; ask again when it has been restarted")
