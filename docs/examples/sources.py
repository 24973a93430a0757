"""Sources: agents that are driven by messages of a subject and by changes of the shared state.

oam mesh listen 'mesh.errors.>'        # the errors of their handlers
"""

import asyncio

from openagentmesh import AgentMesh, AgentSpec, KVEntry, MeshMessage
from pydantic import BaseModel

mesh = AgentMesh()
happened: asyncio.Queue[str] = asyncio.Queue()


class Order(BaseModel):
    item: str


# The queue group delivers each order to one of the hosts that serve this agent.
@mesh.agent(
    AgentSpec(name="shop.packer", description="Packs orders."),
    sources=[mesh.subject_source("shop.orders.*", queue_group="packers")],
)
async def pack(order: MeshMessage[Order]) -> None:
    happened.put_nowait(f"{order.subject}: {order.data.item}")


# Without a queue group each host gets the existing keys, then each change; a deletion has the value None.
@mesh.agent(
    AgentSpec(name="shop.settings", description="Applies the settings of the shop."),
    sources=[mesh.kv_source("shop.settings.>")],
)
async def settings(entry: KVEntry[str | None]) -> None:
    happened.put_nowait(f"{entry.key} = {entry.value}")


async def main() -> None:
    async with mesh.local():
        await mesh.publish("shop.orders.17", Order(item="tea"))
        print(await happened.get())
        await mesh.kv.put("shop.settings.open", "yes")
        print(await happened.get())
        await mesh.kv.delete("shop.settings.open")
        print(await happened.get())


if __name__ == "__main__":
    asyncio.run(main())

# prints
# shop.orders.17: tea
# shop.settings.open = yes
# shop.settings.open = None
