"""Request and reply: a typed function that is called by its agent's name.

oam agent call geo.distance '{"x": 3, "y": 4}'
"""

import asyncio
import math

from openagentmesh import AgentMesh, AgentSpec, InvalidInput
from pydantic import BaseModel

mesh = AgentMesh()


class Point(BaseModel):
    x: float
    y: float


@mesh.agent(AgentSpec(name="geo.distance", description="Distance of a point from the origin.", tags=["math"]))
async def distance(point: Point) -> float:
    return math.hypot(point.x, point.y)


async def main() -> None:
    async with mesh.local():
        print(await mesh.call("geo.distance", Point(x=3, y=4), returns=float))
        try:
            await mesh.call("geo.distance", {"x": "far"})
        except InvalidInput as error:
            print(error.code, [problem["loc"] for problem in error.details["errors"]])


if __name__ == "__main__":
    asyncio.run(main())

# prints
# 5.0
# invalid_input [['x'], ['y']]
