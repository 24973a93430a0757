"""A mesh within one plugin, serving and calling; or what the plugin's layer costs in one process."""

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

from joserfc.jwk import OctKey
from oam_auth import Auth, Settings
from oam_limits import Limits
from oam_limits import Settings as LimitSettings
from oam_metrics import Metrics
from oam_metrics import Settings as MetricsSettings
from oam_tracing import Tracing
from openagentmesh import AgentMesh, AgentSpec, Call, Endpoint, Middleware, hookimpl
from openagentmesh.agent.agent import AgentVersion
from openagentmesh.agent.call import ServedCall
from openagentmesh.hooks.manager import Plugins
from openagentmesh.protocol import codec
from opentelemetry.sdk.trace import TracerProvider

from tests.benchmarks.programs.mesh import serving
from tests.benchmarks.programs.process import provide_or_measure, report
from tests.support.credentials import ALL, token, token_settings

TURNS: Final = 40
_CALLS: Final = 500


class Passing:
    """Does nothing, and is in the way."""

    @hookimpl
    def mesh_middleware(self) -> Middleware:
        def middleware(inner: Endpoint) -> Endpoint:
            async def endpoint(call: Call) -> object:
                return await inner(call)

            return endpoint

        return middleware


def auth() -> Auth:
    """One that lets the caller in whose token is in the environment, and carries it itself."""
    key = OctKey.import_key("a key that only both processes have", {"kid": "shared"})
    os.environ["OAM_TOKEN"] = token(key, {"alg": "HS256"}, exp=4_000_000_000)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "key.json"
        file.write_text(json.dumps(key.as_dict(private=True)))
        tokens = token_settings(Path(folder), keys=(file,), algorithms=("HS256",))
        return Auth(Settings(tokens=tokens, rules=(ALL,)))


PLUGINS: Final[dict[str, Callable[[], list[object]]]] = {
    "passing": lambda: [Passing(), Passing(), Passing()],
    "metrics": lambda: [Metrics(MetricsSettings(port=0))],
    "auth": lambda: [auth()],
    "tracing": lambda: [Tracing()],
    "recording": lambda: [Tracing(TracerProvider(shutdown_on_exit=False))],
    "limits": lambda: [Limits(LimitSettings(rate=1_000_000, share=1))],
}


async def layer(plugins: list[object]) -> float:
    """What the plugins' layers add to a call in one process, in µs: the median of paired turns."""
    mesh = AgentMesh()

    @mesh.agent(AgentSpec(name="bench.layer"))
    async def nothing(req: str) -> str:
        return req

    bare = mesh._agents["bench.layer"]
    layered = Plugins.of(plugins).wrap(bare, {})
    more = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"} | {
        "Authorization": f"Bearer {os.environ.get('OAM_TOKEN', '')}"
    }
    head = codec.request_headers("bench", "caller", timeout=1.0, extra=more)
    request = codec.decode_request(head, b'"hi"')

    limiter = bare.limits.limiter()

    async def turn(agent: AgentVersion) -> float:
        began = perf_counter()
        for _ in range(_CALLS):
            call = ServedCall(
                agent.name,
                request.request_id,
                request.body,
                request.headers,
                request.caller,
                request=request,
                limiter=limiter,
            )
            await agent.outermost(call)
            call.finish(None)
        return (perf_counter() - began) / _CALLS * 1e6

    return median([-await turn(bare) + await turn(layered) for _ in range(TURNS)])


if __name__ == "__main__":
    # Spans go nowhere: neither does anybody wait for a collector.
    os.environ["OTEL_TRACES_EXPORTER"] = "none"
    chosen = PLUGINS[sys.argv.pop(1)]()
    if sys.argv[1:]:
        provide_or_measure(lambda url: serving(url, chosen), lambda url: AgentMesh(url, plugins=chosen))
    else:
        report(value=asyncio.run(layer(chosen)))
