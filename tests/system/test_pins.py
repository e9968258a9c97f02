"""What srsys uses of other packages beyond their documented interfaces; a version without it fails here, by name."""

import asyncio
import functools
import shutil
import subprocess
from importlib import resources

import h11
import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from srsys.serve.access import TimeoutH11Protocol
from srsys.serve.shutdown import DrainingServer

SCRIPTS = [file for file in resources.files("srsys.serve").joinpath("static").iterdir() if file.name.endswith(".js")]
assert len(SCRIPTS) == 4
SCRIPT_PARAMETERS = ("element", "trigger", "props", "server", "upload", "watch")  # of Gradio's js_on_load


async def app(scope, receive, send):
    pass


def test_uvicorns_protocol_has_what_the_head_timeout_uses():
    for method in ("connection_made", "connection_lost", "data_received"):
        assert method in vars(H11Protocol) and method in vars(TimeoutH11Protocol), method
    loop = asyncio.new_event_loop()
    try:
        config = uvicorn.Config(app, http=functools.partial(TimeoutH11Protocol, head_timeout=1.0), log_config=None)
        config.load()
        protocol = config.http_protocol_class(config=config, server_state=ServerState(), app_state={}, _loop=loop)
    finally:
        loop.close()
    assert protocol.head_timeout == 1.0 and protocol.loop is loop
    assert isinstance(protocol.conn, h11.Connection)
    for attribute in ("transport", "scope", "cycle"):
        assert hasattr(protocol, attribute), attribute


def test_uvicorns_server_has_what_draining_uses():
    for method in ("handle_exit", "on_tick"):
        assert method in vars(uvicorn.Server) and method in vars(DrainingServer), method
    assert asyncio.iscoroutinefunction(uvicorn.Server.on_tick)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    assert not server.should_exit and not server.started
    assert server.server_state.connections == set()
    assert "response_complete" in RequestResponseCycle.__init__.__code__.co_names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_pages_scripts_are_functions_of_what_gradio_passes(script):
    if not shutil.which("node"):
        pytest.skip("needs node; test_page.py runs the scripts in a browser")
    parameters = ", ".join(repr(name) for name in SCRIPT_PARAMETERS)
    check = f"new Function({parameters}, require('fs').readFileSync(0, 'utf8'))"
    done = subprocess.run(["node", "-e", check], input=script.read_text(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
