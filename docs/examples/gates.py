"""Activation by a condition: an agent that is active while a key has a value.

While it is inactive it stays in the catalog, and calls get `not_available`.

oam agent call desk.trade '"sell"'
"""

import asyncio

from openagentmesh import AgentMesh, AgentSpec, MeshError

mesh = AgentMesh()


@mesh.agent(
    AgentSpec(name="desk.trade", description="Trades while the desk is open."),
    active_when=mesh.kv_condition("desk.status", lambda status: status == "open"),
)
async def trade(order: str) -> str:
    return f"done: {order}"


async def attempt(order: str) -> str:
    try:
        return str(await mesh.call("desk.trade", order))
    except MeshError as error:
        return error.code


async def main() -> None:
    async with mesh.local():
        print(await attempt("buy"), [entry.name for entry in await mesh.catalog()])

        events = mesh.observe.logs("desk.trade")
        listening = asyncio.ensure_future(anext(events))
        await mesh.kv.put("desk.status", "open")
        print((await listening).event, await attempt("buy"))

        await mesh.kv.put("desk.status", "closed")
        print((await anext(events)).event, await attempt("sell"))
        await events.aclose()


if __name__ == "__main__":
    asyncio.run(main())

# prints
# not_available ['desk.trade']
# agent_activated done: buy
# agent_deactivated not_available
