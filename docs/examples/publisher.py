"""Publish and subscribe: a function without input that yields events.

It runs as long as its host, and is restarted when it fails.

oam agent subscribe market.gold
"""

import asyncio
from collections.abc import AsyncIterator

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()


class Price(BaseModel):
    item: str
    price: float


@mesh.agent(AgentSpec(name="market.gold", description="Publishes the price of gold."))
async def gold() -> AsyncIterator[Price]:
    price = 100.0
    while True:
        yield Price(item="gold", price=price)
        price += 1
        await asyncio.sleep(0.05)


@mesh.agent(AgentSpec(name="market.silver", description="Publishes the price of silver."))
async def silver() -> AsyncIterator[Price]:
    while True:
        yield Price(item="silver", price=20.0)
        await asyncio.sleep(0.05)


async def main() -> None:
    async with mesh.local():
        prices = []
        async for event in mesh.subscribe(agent="market.gold"):
            prices.append(event["price"])
            if len(prices) == 3:
                break
        print("rising:", prices == sorted(prices))

        seen = set()
        async for message in mesh.subscribe(channel="market", messages=True):
            seen.add((message.agent, message.data["item"]))
            if len(seen) == 2:
                break
        print(sorted(seen))


if __name__ == "__main__":
    asyncio.run(main())

# prints
# rising: True
# [('market.gold', 'gold'), ('market.silver', 'silver')]
