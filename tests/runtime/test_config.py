"""Reading mesh.toml: valid keys and values, and one error message for all invalid ones."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from openagentmesh.agent.agent import DEFAULT_LIMITS, Limits
from openagentmesh.runtime.config import Config, ConfigError, load_config
from pydantic import ValidationError

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a text as mesh.toml."""

    def read_(text: str | bytes, environ: Mapping[str, str] | None = None) -> Config:
        file = tmp_path / "mesh.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(file, environ or {})

    return read_


def errors_in(read: Read, text: str | bytes, environ: Mapping[str, str] | None = None) -> list[str]:
    """The lines of the error message, without the first one, which names the file."""
    with pytest.raises(ConfigError) as caught:
        read(text, environ)
    first, *lines = caught.value.message.splitlines()
    assert first.endswith("mesh.toml is invalid:")
    return [line.strip() for line in lines]


def test_an_empty_file_has_all_defaults(read: Read, tmp_path: Path) -> None:
    """No key of mesh.toml is required."""
    assert Config(folder=tmp_path.resolve()) == read("")


def test_all_documented_keys_are_read(read: Read) -> None:
    """A complete mesh.toml is read into the sections of the config."""
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


def test_each_limit_has_its_own_default(read: Read) -> None:
    """Each limit is the agent's own one, or else that of `[limits]`, or else the built-in one."""
    config = read("[limits]\nqueue = 7\n[agents.a]\ntimeout = 2.5\n[agents.b]\nconcurrency = 1\nqueue = 0")
    default = DEFAULT_LIMITS
    assert Limits(default.concurrency, 7, 2.5) == config.limits_of("a")
    assert Limits(1, 0, default.timeout) == config.limits_of("b")
    assert Limits(default.concurrency, 7, default.timeout) == config.limits_of("c")


@pytest.mark.parametrize(
    ("text", "error"),
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
def test_an_unknown_key_is_an_error_with_a_suggestion(read: Read, text: str, error: str) -> None:
    """The error has the key's full path and the most similar key there, or all of them."""
    assert [error] == errors_in(read, text)


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
def test_an_invalid_value_is_an_error(read: Read, text: str, key: str, expected: str, found: str) -> None:
    """The error is one line with the key as in the file, the expected type or range, and the value."""
    (line,) = errors_in(read, text)
    assert line.startswith(f"{key}: ")
    assert line.endswith(f"found {found}")
    assert expected in line


@pytest.mark.parametrize("name", ["nlp.summarizer", "a.b.c"])
def test_an_unquoted_agent_name_is_an_error(read: Read, name: str) -> None:
    """A dotted name that TOML reads as nested tables is shown in quotes, as it has to be written."""
    (line,) = errors_in(read, f"[agents.{name}]\nqueue = 1")
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
def test_a_restart_pause_above_its_maximum_is_an_error(
    read: Read, text: str, key: str, pauses: tuple[str, str]
) -> None:
    """The error has the key that was set and both values."""
    (line,) = errors_in(read, text)
    assert line.startswith(
        f"{key}: restart_pause ({pauses[0]}) is longer than its maximum, restart_pause_max ({pauses[1]})"
    )


def test_an_inherited_restart_pause_is_reported_once(read: Read) -> None:
    """An agent that inherits invalid pauses of `[limits]` is no further error; equal pauses are valid."""
    assert 1 == len(errors_in(read, "[limits]\nrestart_pause = 100\n[agents.x]\nqueue = 1"))
    assert 2 == read("[limits]\nrestart_pause = 2\nrestart_pause_max = 2").limits.restart_pause


def test_settings_without_a_module_are_reported(read: Read) -> None:
    """A table of `[settings]` that matches no module is reported with the most similar module."""
    config = read("[settings.echo]\n[settings.sumarizer]\nx = 1\n[settings.'zz z']")
    assert [
        "mesh.toml has [settings.sumarizer], but there is no module 'sumarizer'; did you mean 'summarizer'?",
        "mesh.toml has [settings.\"zz z\"], but there is no module 'zz z'; modules: echo, summarizer",
    ] == list(config.unused(["summarizer", "echo"], []))
    assert [] == list(read("").unused([], []))


@pytest.mark.parametrize("value", ["'foo'", "5", "['a', 5]", "{}"])
def test_an_error_of_a_union_names_the_key_only(read: Read, value: str) -> None:
    """Errors of `entry_points`, a boolean or a list, do not name one of its types as part of the key."""
    lines = errors_in(read, f"[host]\nentry_points = {value}")
    assert lines
    assert all(line.startswith(("host.entry_points: ", "host.entry_points[1]: ")) for line in lines), lines


def test_variables_are_replaced_in_all_values(read: Read) -> None:
    """`${NAME}` and `${NAME:-default}` are replaced in any text, at any depth, also for numbers."""
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


def test_a_missing_variable_is_an_error_with_its_key(read: Read) -> None:
    """Every variable that is not set is reported, with the path of its key and both solutions."""
    assert [
        "mesh.creds: the variable CREDS is not set; set it, or write ${CREDS:-default}",
        "settings.a.keys[1]: the variable KEY is not set; set it, or write ${KEY:-default}",
    ] == errors_in(read, "[mesh]\ncreds = '${CREDS}'\n[settings.a]\nkeys = ['x', '${KEY}']")


def test_all_errors_are_in_one_message(read: Read) -> None:
    """Unknown keys, invalid values and missing variables are reported together."""
    text = "[server]\nprot = 1\nport = 'x'\n[mesh]\nurl = '${NO}'\n[limits]\nqueue = -1\n[hots]"
    keys = sorted(line.partition(":")[0] for line in errors_in(read, text))
    assert ["hots", "limits.queue", "mesh.url", "server.port", "server.prot"] == keys


@pytest.mark.parametrize("text", ["[host", "a = ", "a = 1\na = 2", b"\xff\xfe", b"a = '\xe9'"])
def test_invalid_toml_is_an_error_with_the_file(read: Read, text: str | bytes) -> None:
    """A syntax error and a file that is not UTF-8 name the file."""
    with pytest.raises(ConfigError, match=r"mesh\.toml is not TOML: "):
        read(text)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """The error names the file and the option `--config`; a folder is no file either."""
    with pytest.raises(ConfigError, match=r"other\.toml cannot be read: .*--config"):
        load_config(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_the_default_file_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without mesh.toml in the working directory the config has defaults for that folder."""
    monkeypatch.chdir(tmp_path)
    assert Config(folder=tmp_path) == load_config()
    (tmp_path / "mesh.toml").write_text("[host]\nname = 'found'")
    assert "found" == load_config().host.name


def test_paths_are_relative_to_the_folder_of_the_file(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory does not matter; absolute paths stay, and `~` is the home folder."""
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/user")
    config = read("")
    assert [str(tmp_path.resolve() / "host.creds"), "/etc/x.creds", "/home/user/x", None, None] == [
        config.path(text) for text in ("host.creds", "/etc/x.creds", "~/x", "", None)
    ]


def test_a_config_is_immutable(read: Read) -> None:
    """An assignment to a field of a config is an error."""
    with pytest.raises(ValidationError, match="frozen"):
        read("").host.name = "other"
