"""Agents as tools of a language model, in the format of each API."""

import asyncio
import json

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel, Field

mesh = AgentMesh()


class Query(BaseModel):
    city: str = Field(description="Name of the city.")
    days: int = 1


class Forecast(BaseModel):
    text: str


@mesh.agent(AgentSpec(name="weather.forecast", description="Forecasts the weather."))
async def forecast(query: Query) -> Forecast:
    return Forecast(text=f"{query.city}: sun for {query.days} days")


async def main() -> None:
    async with mesh.local():
        contract = await mesh.contract("weather.forecast")
        tool = contract.to_openai_tool(strict=True)["function"]
        print(tool["name"], "|", tool["description"].replace("\n", " "))
        print(sorted(tool["parameters"]["required"]))

        # The arguments of the tool call, as the model returned them:
        arguments = json.loads('{"city": "Oslo", "days": null}')
        print(await mesh.call("weather.forecast", contract.tool_input(arguments)))
        print(sorted(contract.to_agent_card(url="https://agents.example.com/weather")))


if __name__ == "__main__":
    asyncio.run(main())

# prints
# weather_forecast | Forecasts the weather. Returns: text.
# ['city', 'days']
# {'text': 'Oslo: sun for 1 days'}
# ['capabilities', 'description', 'name', 'skills', 'url', 'version']
