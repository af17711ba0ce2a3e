import asyncio

import pytest

from edgesync.errors import ConfigError
from gateway import http


@pytest.fixture
async def server():
    made = http.HttpServer(
        {
            "/livez": lambda: http.Response(200, b"ok\n"),
            "/readyz": lambda: http.json_response(503, {"reasons": ["no broker"]}),
        }
    )
    await made.start("127.0.0.1", 0)
    yield made
    await made.close()


async def ask(server, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("request_bytes", "status", "body"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", b"200", b"ok\n"),
        (b"GET /livez?x=1 HTTP/1.0\r\n\r\n", b"200", b"ok\n"),
        (b"HEAD /livez HTTP/1.1\r\n\r\n", b"200", b""),
        (b"GET /readyz HTTP/1.1\r\n\r\n", b"503", b'{"reasons": ["no broker"]}\n'),
        (b"GET /nothing HTTP/1.1\r\n\r\n", b"404", b"not found\n"),
        (b"POST /livez HTTP/1.1\r\n\r\n", b"405", b"only GET and HEAD\n"),
        (b"\xff\xfe\r\n\r\n", b"400", b"this is not HTTP/1.1\n"),
        (b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n", b"431", b"the request is too long\n"),
    ],
)
async def test_answers(server, request_bytes, status, body):
    head, _, got = (await ask(server, request_bytes)).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == status
    assert got == body


async def test_a_client_that_leaves_is_no_trouble(server):
    _reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /liv")
    writer.close()
    assert b"200" in await ask(server, b"GET /livez HTTP/1.1\r\n\r\n")


async def test_too_many_connections(server):
    idle = [
        await asyncio.open_connection("127.0.0.1", server.port) for _ in range(http.MAX_CONNECTIONS)
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    assert await reader.read() == b""
    for one in (writer, *(idle_writer for _reader, idle_writer in idle)):
        one.close()


async def test_port_in_use_is_one_sentence(server):
    with pytest.raises(ConfigError, match="cannot listen for HTTP"):
        await http.HttpServer({}).start("127.0.0.1", server.port)


def test_metrics_text():
    text = http.render_metrics(
        [
            http.metric("edgesync_mqtt_connected", "gauge", "1 while connected.", 1),
            http.metric(
                "edgesync_gateway_devices",
                "gauge",
                "Devices.",
                {(("state", 'a"b\n'),): 2, (("state", "c"),): 0.5},
            ),
        ]
    ).body.decode()
    assert text == (
        "# HELP edgesync_mqtt_connected 1 while connected.\n# TYPE edgesync_mqtt_connected gauge\n"
        "edgesync_mqtt_connected 1\n"
        "# HELP edgesync_gateway_devices Devices.\n# TYPE edgesync_gateway_devices gauge\n"
        'edgesync_gateway_devices{state="a\\"b\\n"} 2\nedgesync_gateway_devices{state="c"} 0.5\n'
    )
