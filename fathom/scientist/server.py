"""The scientist over HTTP: one address for questions, three for looking, and no other.

    POST /v1/query        {"verb": .., "arguments": {..}} with `Authorization: Bearer KEY`
    GET  /healthz         whether questions are answered
    GET  /v1/checkpoint   the log's last checkpoint: keep it, and be a witness
    GET  /v1/schema       this interface as an OpenAPI document

Nothing adds evidence, theories or files, or takes an address to call back. A `Service` answers, one question at a time.
"""

import asyncio
import json
import socket
from typing import Any

from fathom.errors import UserError
from fathom.scientist.service import STATUS, Service
from fathom.scientist.verbs import MAX_REQUEST, VERBS

Values = dict[str, Any]
READ_SECONDS = 10.0
"""How long a request may take to arrive."""


def schema() -> Values:
    """The interface as OpenAPI 3.1."""

    def response(says: str, properties: tuple[str, ...]) -> Values:
        content = {"type": "object", "required": list(properties)}
        return {"description": says, "content": {"application/json": {"schema": content}}}

    requests = [
        {"type": "object", "additionalProperties": False, "description": verb.says,
         "required": ["verb", "arguments"] if verb.required else ["verb"],
         "properties": {"verb": {"const": name}, "arguments": verb.schema}}
        for name, verb in VERBS.items()
    ]  # fmt: skip
    refusals = {str(status): response("Refused, and why.", ("refused",)) for status in {*STATUS.values(), 408, 413}}
    answered = response("An answer or an abstention.", ("answer", "log", "checkpoint", "forking_paths"))
    query = {
        "operationId": "query", "security": [{"key": []}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"oneOf": requests}}}},
        "responses": {"200": answered, **refusals},
    }  # fmt: skip

    def look(name: str, says: str, *properties: str) -> Values:
        return {"get": {"operationId": name, "responses": {"200": response(says, properties)}}}

    return {
        "openapi": "3.1.0", "info": {"title": "A scientist's questions", "version": "1"},
        "paths": {
            "/v1/query": {"post": query},
            "/healthz": look("health", "Whether questions are answered.", "status", "world"),
            "/v1/checkpoint": look("checkpoint", "The log's last checkpoint.", "checkpoint"),
            "/v1/schema": look("schema", "This document.", "openapi"),
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip


def application(service: Service) -> Any:
    """An ASGI application over a service.

    Raises:
        UserError: the extra `serve` is missing.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route
    except ImportError:
        raise UserError("a server needs the extra `serve`: pip install 'fathom-attnres[serve]'") from None

    def refused(status: int, reason: str, detail: str) -> Response:
        return JSONResponse({"refused": {"reason": reason, "detail": detail}}, status)

    async def query(request: Request) -> Response:
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return refused(401, "key", "give a key: `Authorization: Bearer KEY`")
        body = b""
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > MAX_REQUEST:
                        return refused(413, "request", f"a request may have {MAX_REQUEST:,} bytes")
        except TimeoutError:
            return refused(408, "request", "the request took too long to arrive")
        reply = await run_in_threadpool(service.ask, secret.strip(), body)
        return JSONResponse(reply.document, reply.status)

    async def health(_: Request) -> Response:
        return JSONResponse(service.health().document)

    async def checkpoint(_: Request) -> Response:
        return JSONResponse({"checkpoint": service.checkpoint})

    async def interface(_: Request) -> Response:
        return Response(json.dumps(schema()), media_type="application/json")

    return Starlette(routes=[
        Route("/v1/query", query, methods=["POST"]), Route("/healthz", health, methods=["GET"]),
        Route("/v1/checkpoint", checkpoint, methods=["GET"]), Route("/v1/schema", interface, methods=["GET"]),
    ])  # fmt: skip


def serve(app: Any, host: str, port: int) -> None:
    """Serve an application until interrupted.

    Raises:
        UserError: the address cannot be listened on.
    """
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="off", limit_concurrency=64,
        timeout_keep_alive=5, h11_max_incomplete_event_size=16_384,
    )  # fmt: skip
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on: {error.strerror or error}") from None
    with listening:
        uvicorn.Server(config).run(sockets=[listening])
