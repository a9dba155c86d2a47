"""The server as a process: its start and its end."""

import ipaddress
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from fastapi import FastAPI

from nanovllm.async_engine.async_llm import CLOSED, AsyncLLM

POLL_SECONDS = 0.2
END_SECONDS = 2  # for which clients can hear of the engine's end


def serve(app: FastAPI, engine: AsyncLLM, host: str, port: int, shutdown_timeout: int, has_keys: bool) -> int:
    """Serves until it is told to end, which also ends the engine; returns the exit status: 1 if the engine has failed.

    What is served, `shutdown_timeout` in seconds and `has_keys` are as `nanovllm serve --help` says.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=shutdown_timeout + END_SECONDS,
    )
    listener = config.bind_socket()
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"nano-vllm: {app.title} is served at http://{address}", file=sys.stderr, flush=True)
    if not has_keys and not ipaddress.ip_address(host).is_loopback:
        print("nano-vllm: other machines can reach it, without a key: --api-key asks for one", file=sys.stderr)
    server = uvicorn.Server(config)
    # uvicorn ends at SIGTERM and Ctrl-C, in order, then raises them again: then there is nothing left to be done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    with ThreadPoolExecutor(1) as pool:
        supervision = pool.submit(supervise, server, engine, shutdown_timeout)
        try:
            server.run(sockets=[listener])
        finally:
            engine.close()
    supervision.result()
    if engine.failure == CLOSED:
        return 0
    print(f"nano-vllm: the engine is dead: {engine.failure}", file=sys.stderr, flush=True)
    return 1


def supervise(server: uvicorn.Server, engine: AsyncLLM, shutdown_timeout: int) -> None:
    """Ends the server once the engine has failed, and the engine if the server takes too long to end."""
    while engine.thread.is_alive() and not server.should_exit:
        engine.thread.join(POLL_SECONDS)
    if not server.should_exit:
        time.sleep(END_SECONDS)
        server.should_exit = True
    engine.thread.join(shutdown_timeout)
    engine.close()  # so that what still runs is told so
