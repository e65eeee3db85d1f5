"""The scientist over the Model Context Protocol, on standard input and output: a tool for every verb, and nothing else.

The caller's key is given to the process that starts it; budgets, filters, log and quarantine are those of the `Service`. Tools
are marked read-only, which is a hint to clients and no protection: protection is behind the service.
"""

import json
from typing import Any

from fathom.errors import UserError
from fathom.scientist.service import Service
from fathom.scientist.verbs import VERBS


def server(service: Service, secret: str) -> Any:
    """A server whose tools are the verbs, asked with one key.

    Raises:
        UserError: the extra `mcp` is missing.
    """
    try:
        import anyio.to_thread
        import mcp_types as types
        from mcp.server.lowlevel import Server
    except ImportError:
        raise UserError("this needs the extra `mcp`: pip install 'fathom-attnres[mcp]'") from None

    async def tools(_: Any, __: Any) -> Any:
        hints = types.ToolAnnotations(
            read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False
        )
        return types.ListToolsResult(tools=[
            types.Tool(name=name, description=verb.says, input_schema=verb.schema, annotations=hints)
            for name, verb in VERBS.items()
        ])  # fmt: skip

    async def call(_: Any, params: Any) -> Any:
        body = json.dumps({"verb": params.name, "arguments": params.arguments or {}}).encode()
        reply = await anyio.to_thread.run_sync(service.ask, secret, body)
        return types.CallToolResult(
            content=[types.TextContent(text=json.dumps(reply.document))], structured_content=reply.document,
            is_error=reply.status != 200,
        )  # fmt: skip

    return Server("fathom-scientist", on_list_tools=tools, on_call_tool=call)


def serve(service: Service, secret: str) -> None:
    """Serve standard input and output until they close."""
    made = server(service, secret)
    import anyio
    from mcp.server.stdio import stdio_server

    async def run() -> None:
        async with stdio_server() as (read, write):
            await made.run(read, write, made.create_initialization_options())

    anyio.run(run)
