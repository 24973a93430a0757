"""Shared state: texts and models under keys, changed concurrently without a lost update.

oam agent call plan.add '"step"'
"""

import asyncio
from contextlib import suppress

from openagentmesh import AgentMesh, AgentSpec, KVConflict, KVKeyExists
from pydantic import BaseModel

mesh = AgentMesh()


class Plan(BaseModel):
    steps: list[str] = []


@mesh.agent(AgentSpec(name="plan.add", description="Adds a step to the shared plan."))
async def add(step: str) -> int:
    with suppress(KVKeyExists):
        await mesh.kv.create("plan", Plan().model_dump_json())
    for _ in range(20):
        async with mesh.kv.try_cas_model("plan", Plan) as draft:
            draft.value = Plan(steps=[*draft.value.steps, step])
        if draft.committed:
            return len(draft.value.steps)
    raise KVConflict("the plan changes too fast")


async def main() -> None:
    async with mesh.local():
        await asyncio.gather(*[mesh.call("plan.add", f"step {number}") for number in range(5)])
        print(sorted((await mesh.kv.get_model("plan", Plan)).steps))

        await mesh.kv.create("counter", "0")
        await asyncio.gather(*[mesh.kv.update("counter", lambda text: str(int(text) + 1)) for _ in range(5)])
        print(await mesh.kv.get("counter"))

        try:
            await mesh.kv.create("counter", "0")
        except KVKeyExists as error:
            print(error.code)

        async for value in mesh.kv.watch("counter"):
            print("now", value)
            break
        print([entry.key for entry in await mesh.kv.list("c")])


if __name__ == "__main__":
    asyncio.run(main())

# prints
# ['step 0', 'step 1', 'step 2', 'step 3', 'step 4']
# 5
# kv_key_exists
# now 5
# ['counter']
