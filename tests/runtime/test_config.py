"""mesh.toml: what may stand in it, and one message for all that may not."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from openagentmesh.agent.agent import DEFAULT_LIMITS, Limits
from openagentmesh.runtime.config import Config, ConfigError, load_config
from pydantic import ValidationError

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read a text as mesh.toml."""

    def read_(text: str | bytes, environ: Mapping[str, str] | None = None) -> Config:
        file = tmp_path / "mesh.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(file, environ or {})

    return read_


def problems(read: Read, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    """The lines of the one message, without its first, which names the file."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    first, *lines = caught.value.message.splitlines()
    assert first.endswith("mesh.toml is invalid:")
    return [line.strip() for line in lines]


def test_an_empty_file_is_all_defaults(read: Read, tmp_path: Path) -> None:
    """Nothing has to stand in mesh.toml."""
    assert Config(folder=tmp_path.resolve()) == read("")


def test_everything_that_api_md_shows_is_read(read: Read) -> None:
    """A whole mesh.toml arrives in the sections of the config."""
    config = read(
        """
        [mesh]
        url = "nats://mesh.example.com:4222"
        creds = "host.creds"
        [server]
        port = 0
        store = ""
        websocket = true
        [host]
        name = "dev"
        agents = ["agents", "more/one.py", "package.module"]
        entry_points = ["a"]
        plugins = ["tracing", "./mine.py"]
        strict = true
        drain_timeout = 0
        contract = "refuse"
        reload = false
        load_timeout = 2.5
        threads = 3
        [limits]
        concurrency = 64
        queue = 0
        timeout = 60
        restart_pause = 2
        restart_pause_max = 8
        [agents."nlp.summarizer"]
        concurrency = 8
        restart_pause_max = 4
        [agents.off]
        enabled = false
        [settings.summarizer]
        model = "small"
        deep = { list = [1, { x = "y" }] }
        """
    )
    assert ("nats://mesh.example.com:4222", "host.creds") == (config.mesh.url, config.mesh.creds)
    assert (0, "", True) == (config.server.port, config.server.store, config.server.websocket)
    assert {
        "name": "dev",
        "agents": ["agents", "more/one.py", "package.module"],
        "entry_points": ["a"],
        "plugins": ["tracing", "./mine.py"],
        "strict": True,
        "drain_timeout": 0,
        "contract": "refuse",
        "reload": False,
        "load_timeout": 2.5,
        "threads": 3,
    } == config.host.model_dump()
    assert {"model": "small", "deep": {"list": [1, {"x": "y"}]}} == config.settings["summarizer"]
    assert (Limits(8, 0, 60, 2, 4), Limits(64, 0, 60, 2, 8)) == (
        config.limits_of("nlp.summarizer"),
        config.limits_of("x"),
    )
    assert [False, True, True] == [config.is_enabled(name) for name in ("off", "nlp.summarizer", "x")]


def test_limits_are_defaulted_one_by_one(read: Read) -> None:
    """An agent's limit is its own, else `[limits]`', else the built-in one, each by itself."""
    config = read("[limits]\nqueue = 7\n[agents.a]\ntimeout = 2.5\n[agents.b]\nconcurrency = 1\nqueue = 0")
    default = DEFAULT_LIMITS
    assert Limits(default.concurrency, 7, 2.5) == config.limits_of("a")
    assert Limits(1, 0, default.timeout) == config.limits_of("b")
    assert Limits(default.concurrency, 7, default.timeout) == config.limits_of("c")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[host]\nnaem = 'x'", "host.naem: unknown key; did you mean 'name'?"),
        ("[hots]\nname = 'x'", "hots: unknown key; did you mean 'host'?"),
        ("[zzzzz]", "zzzzz: unknown key; known keys: agents, host, limits, mesh, plugins, server, settings"),
        ("[mesh]\nzzzzz = 1", "mesh.zzzzz: unknown key; known keys: creds, tls_ca, tls_cert, tls_key, url"),
        (
            "folder = 'x'",
            "folder: unknown key; known keys: agents, host, limits, mesh, plugins, server, settings",
        ),
        ("[agents.x]\nconcurency = 1", "agents.x.concurency: unknown key; did you mean 'concurrency'?"),
        ("[agents.'a.b']\nqueu = 1", "agents.\"a.b\".queu: unknown key; did you mean 'queue'?"),
        ("[agents.queue]\nqueu = 1", "agents.queue.queu: unknown key; did you mean 'queue'?"),
        ("[agents.enabled]\nqueu = 1", "agents.enabled.queu: unknown key; did you mean 'queue'?"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(read: Read, text: str, problem: str) -> None:
    """The message has the key's whole path and a key that exists there, whatever an agent is called."""
    assert [problem] == problems(read, text)


@pytest.mark.parametrize(
    ("text", "key", "expected", "found"),
    [
        ("[server]\nport = 'x'", "server.port", "integer", "'x'"),
        ("[server]\nport = 65536", "server.port", "less than or equal to 65535", "65536"),
        ("[server]\nport = true", "server.port", "integer", "true"),
        ("[mesh]\nurl = 5", "mesh.url", "string", "5"),
        ("mesh = 5", "mesh", "a table, [mesh]", "5"),
        ("[host]\nagents = 'agents'", "host.agents", "list", "'agents'"),
        ("[host]\nagents = ['a', 5]", "host.agents[1]", "string", "5"),
        ("[host]\nstrict = 'perhaps'", "host.strict", "boolean", "'perhaps'"),
        ("[host]\ndrain_timeout = -1", "host.drain_timeout", "greater than or equal to 0", "-1"),
        ("[limits]\nconcurrency = 0", "limits.concurrency", "greater than or equal to 1", "0"),
        ("[limits]\nconcurrency = 1.5", "limits.concurrency", "integer", "1.5"),
        ("[limits]\ntimeout = 0", "limits.timeout", "greater than 0", "0"),
        ("[limits]\ntimeout = nan", "limits.timeout", "", "nan"),
        ("[limits]\ntimeout = inf", "limits.timeout", "", "inf"),
        ("[agents.x]\nqueue = -1", "agents.x.queue", "greater than or equal to 0", "-1"),
        ("[agents]\nx = 5", "agents.x", "a table, [agents.x]", "5"),
        ("[agents]\nqueue = 5", "agents.queue", "belong into [limits]", "5"),
        ("[[server]]", "server", "a table, [server]", "[{}]"),
        ("[settings]\nx = 5", "settings.x", "a table, [settings.x]", "5"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected_and_found(
    read: Read, text: str, key: str, expected: str, found: str
) -> None:
    """The one line has the key as it stands in the file, the expected type or range, and the value."""
    (line,) = problems(read, text)
    assert line.startswith(f"{key}: ")
    assert line.endswith(f"found {found}")
    assert expected in line


@pytest.mark.parametrize("name", ["nlp.summarizer", "a.b.c"])
def test_an_agents_name_that_is_not_quoted(read: Read, name: str) -> None:
    """A dotted name that TOML takes for tables within tables is shown as it has to be written."""
    (line,) = problems(read, f"[agents.{name}]\nqueue = 1")
    assert line.endswith(f'quote the name of an agent: [agents."{name}"]')


@pytest.mark.parametrize(
    ("text", "key", "pauses"),
    [
        ("[limits]\nrestart_pause = 100", "limits.restart_pause", ("100 s", "60 s")),
        ("[limits]\nrestart_pause_max = 0.1", "limits.restart_pause_max", ("0.5 s", "0.1 s")),
        ("[agents.x]\nrestart_pause = 70", "agents.x.restart_pause", ("70 s", "60 s")),
        (
            "[limits]\nrestart_pause = 2\n[agents.'a.b']\nrestart_pause_max = 1",
            'agents."a.b".restart_pause_max',
            ("2 s", "1 s"),
        ),
    ],
)
def test_a_restart_pause_above_its_own_bound(
    read: Read, text: str, key: str, pauses: tuple[str, str]
) -> None:
    """The first pause may not be longer than the longest; the message has the key that was set and both."""
    (line,) = problems(read, text)
    assert line.startswith(
        f"{key}: restart_pause ({pauses[0]}) is longer than its maximum, restart_pause_max ({pauses[1]})"
    )


def test_an_inherited_restart_pause_is_told_once(read: Read) -> None:
    """An agent that only inherits the pauses of `[limits]` is no problem of its own, equal ones are none."""
    assert 1 == len(problems(read, "[limits]\nrestart_pause = 100\n[agents.x]\nqueue = 1"))
    assert 2 == read("[limits]\nrestart_pause = 2\nrestart_pause_max = 2").limits.restart_pause


def test_settings_that_nobody_reads(read: Read) -> None:
    """A table of `[settings]` without a module of its name is told with the nearest name there is."""
    config = read("[settings.echo]\n[settings.sumarizer]\nx = 1\n[settings.'zz z']")
    assert [
        "mesh.toml has [settings.sumarizer], but there is no module 'sumarizer'; did you mean 'summarizer'?",
        "mesh.toml has [settings.\"zz z\"], but there is no module 'zz z'; modules: echo, summarizer",
    ] == list(config.unused(["summarizer", "echo"], []))
    assert [] == list(read("").unused([], []))


@pytest.mark.parametrize("value", ["'foo'", "5", "['a', 5]", "{}"])
def test_a_key_of_two_types_is_named_as_it_stands_in_the_file(read: Read, value: str) -> None:
    """`entry_points`, true, false or a list, is never called by the name of one of its types."""
    lines = problems(read, f"[host]\nentry_points = {value}")
    assert lines
    assert all(line.startswith(("host.entry_points: ", "host.entry_points[1]: ")) for line in lines), lines


def test_variables_are_filled_in_everywhere(read: Read) -> None:
    """`${NAME}` and `${NAME:-default}` work in any text, at any depth, also for numbers."""
    config = read(
        """
        [mesh]
        url = "nats://${HOST}:${PORT:-4222}"
        [server]
        port = "${PORT:-4223}"
        [settings.a]
        list = ["${HOST}", { x = "${NONE:-}" }]
        plain = "$HOST {HOST} $${}"
        set = "${HOST:-unused}"
        """,
        {"HOST": "h"},
    )
    assert ("nats://h:4222", 4223) == (config.mesh.url, config.server.port)
    assert {"list": ["h", {"x": ""}], "plain": "$HOST {HOST} $${}", "set": "h"} == config.settings["a"]


def test_a_missing_variable_is_named_with_its_key(read: Read) -> None:
    """Every variable that is not set is told, each with the path of its key and both remedies."""
    assert [
        "mesh.creds: the variable CREDS is not set; set it, or write ${CREDS:-default}",
        "settings.a.keys[1]: the variable KEY is not set; set it, or write ${KEY:-default}",
    ] == problems(read, "[mesh]\ncreds = '${CREDS}'\n[settings.a]\nkeys = ['x', '${KEY}']")


def test_all_problems_stand_in_one_message(read: Read) -> None:
    """Unknown keys, wrong values and missing variables are told at once, not one a start."""
    text = "[server]\nprot = 1\nport = 'x'\n[mesh]\nurl = '${NO}'\n[limits]\nqueue = -1\n[hots]"
    keys = sorted(line.partition(":")[0] for line in problems(read, text))
    assert ["hots", "limits.queue", "mesh.url", "server.port", "server.prot"] == keys


@pytest.mark.parametrize("text", ["[host", "a = ", "a = 1\na = 2", b"\xff\xfe", b"a = '\xe9'"])
def test_what_is_no_toml_is_told_with_the_file(read: Read, text: str | bytes) -> None:
    """A syntax error, and a file that is no UTF-8, name the file."""
    with pytest.raises(ConfigError, match=r"mesh\.toml is not TOML: "):
        read(text)


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    """The message names the file and how to say where it is; a folder is no file either."""
    with pytest.raises(ConfigError, match=r"other\.toml cannot be read: .*--config"):
        load_config(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_without_a_file_everything_is_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder without mesh.toml the host starts with defaults, from that folder on."""
    monkeypatch.chdir(tmp_path)
    assert Config(folder=tmp_path) == load_config()
    (tmp_path / "mesh.toml").write_text("[host]\nname = 'found'")
    assert "found" == load_config().host.name


def test_relative_paths_start_at_the_files_folder(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path means the same from wherever the host is started; absolute and home paths stay."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/somebody")
    config = read("")
    assert [str(tmp_path.resolve() / "host.creds"), "/etc/x.creds", "/home/somebody/x", None, None] == [
        config.path(text) for text in ("host.creds", "/etc/x.creds", "~/x", "", None)
    ]


def test_a_config_cannot_be_changed(read: Read) -> None:
    """Nobody turns a knob behind the host's back: a config is frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        read("").host.name = "other"
