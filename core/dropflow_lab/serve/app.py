"""The server's routes, as an ASGI application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import Response as PlainResponse
from starlette.routing import Route

from dropflow.errors import escaped
from dropflow_lab.serve.api_error import ApiError, internal_error
from dropflow_lab.serve.exchange import Exchange
from dropflow_lab.serve.http import ClientLeft, Receive, Response, Scope, Send, header, read_body
from dropflow_lab.serve.metrics import CONTENT_TYPE
from dropflow_lab.serve.replies import encoded
from dropflow_lab.serve.service import Service

_log = logging.getLogger("dropflow.serve")

Handler = Callable[[Service, Scope, Receive, Response], Awaitable[None]]


def build_app(service: Service) -> Starlette:
    """Return the application of a service, whose worker has been started."""
    routes: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/chat/completions", _chat),
        ("GET", "/v1/models", _models),
        ("GET", "/v1/models/{name:path}", _model),
        ("POST", "/v1/files", _upload),
        ("GET", "/v1/files/{name}", _file),
        ("DELETE", "/v1/files/{name}", _delete),
        ("GET", "/health", _health),
        ("GET", "/metrics", _metrics),
    ]
    return Starlette(
        routes=[Route(path, _Endpoint(service, handler), methods=[method]) for method, path, handler in routes],
        exception_handlers={404: _no_route, 405: _no_route},
    )


class _Endpoint:
    """A route whose handler may raise `ApiError`."""

    def __init__(self, service: Service, handler: Handler) -> None:
        self._service, self._handler = service, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = Response(send)
        try:
            await self._handler(self._service, scope, receive, response)
        except ApiError as error:
            await response.error(error)
        except ClientLeft:
            return
        except Exception:  # noqa: BLE001  # a fault of the server: its details are for the log, not for the client
            _log.exception("a request failed")
            await response.error(internal_error())


def _no_route(request: Request, error: Any) -> Any:
    told = ApiError(error.status_code, "no_such_route", f"no {request.method} {request.url.path} here")
    return PlainResponse(encoded(told.to_json()), error.status_code, media_type="application/json")


def _owner(service: Service, scope: Scope) -> str:
    return service.keys.owner(header(scope, "authorization"))


async def _chat(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    await Exchange(service, receive, response).run(scope)


async def _models(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del receive
    _owner(service, scope)
    await response.whole(encoded(service.names.to_json(service.created)))


async def _model(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del receive
    _owner(service, scope)
    name = scope["path_params"]["name"]
    service.names.policy(name)
    listed = service.names.to_json(service.created)["data"]
    await response.whole(encoded(next(one for one in listed if one["id"] == name)))


async def _upload(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    owner = _owner(service, scope)
    with service.inside():
        body = await read_body(scope, receive, service.limits)
        try:
            async with Request(scope, _replayed(body)).form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose", "vision")
                data = None if file is None or isinstance(file, str) else await file.read()
        except (HTTPException, MultiPartException) as error:
            raise ApiError(400, "invalid_form", f"expected multipart/form-data: {escaped(error)}") from None
        if file is None or isinstance(file, str) or data is None:
            raise ApiError(400, "invalid_form", "expected multipart/form-data with a `file`", "file")
        upload = service.uploads.add(owner, str(file.filename or ""), str(purpose), data)
        await response.whole(encoded(upload.to_json()))


def _replayed(body: bytes) -> Receive:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _file(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del receive
    owner = _owner(service, scope)
    await response.whole(encoded(service.uploads.get(owner, scope["path_params"]["name"]).to_json()))


async def _delete(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del receive
    owner, name = _owner(service, scope), scope["path_params"]["name"]
    service.uploads.delete(owner, name)
    await response.whole(encoded({"id": name, "object": "file", "deleted": True}))


async def _health(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del scope, receive
    healthy = service.healthy
    await response.whole(encoded({"status": "ok" if healthy else "stopping"}), 200 if healthy else 503)


async def _metrics(service: Service, scope: Scope, receive: Receive, response: Response) -> None:
    del receive
    _owner(service, scope)
    await response.whole(service.metrics.text(), kind=CONTENT_TYPE)
