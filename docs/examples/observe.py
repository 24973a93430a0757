"""Log events of agents, with a level that is changed while they run, and the usage that requests report.

oam observe set nlp.echo --log-level debug && oam observe logs nlp.echo
"""

import asyncio
from contextlib import aclosing

from openagentmesh import AgentMesh, AgentSpec, MeshError, Usage, report_usage

mesh = AgentMesh()


@mesh.agent(AgentSpec(name="nlp.echo", description="Returns a text, and reports its usage."))
async def echo(text: str) -> str:
    if not text:
        raise ValueError("there is nothing to echo")
    report_usage(Usage(input_tokens=len(text.split()), model="parrot-1"))
    return text


async def main() -> None:
    async with mesh.local(), aclosing(mesh.observe.logs("nlp.echo", level="info")) as events:
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await mesh.call("nlp.echo", "hello world")
        event = await first
        print(event.event, event.data)

        try:
            await mesh.call("nlp.echo", "")
        except MeshError:
            event = await anext(events)
            print(event.level, event.event, event.message, event.data)

        await mesh.observe.set("nlp.echo", log_level="debug")
        print((await mesh.observe.get("nlp.echo")).log_level)


if __name__ == "__main__":
    asyncio.run(main())

# prints
# usage_reported {'input_tokens': 2, 'model': 'parrot-1'}
# warn request_failed there is nothing to echo {'code': 'handler_error'}
# debug
