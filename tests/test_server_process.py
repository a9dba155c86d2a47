"""The server as a process: what its command line takes, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from faults import children, processes, wait_until

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason=f"needs {package}, which the extra [test] brings")
import httpx  # noqa: E402 (needs the packages, as those below)
from servers import DEMO, ServerProcess  # noqa: E402

from nanovllm.cli.main import main  # noqa: E402
from nanovllm.cli.serve import API_KEY_VARIABLE  # noqa: E402

pytestmark = pytest.mark.timeout(120)

LONG = {"temperature": 0, "max_tokens": 300, "ignore_eos": True}
ENDLESS = LONG | {"max_tokens": 2000}


def ask(url: str, index: int, body: dict) -> dict | Exception:
    """The answer to a request, or why there is none."""
    try:
        response = httpx.post(f"{url}/v1/completions", json=body | {"prompt": [index + 2]}, timeout=90)
        return response.json()
    except httpx.TransportError as error:
        return error


def is_computing(url: str, number: int) -> bool:
    text = httpx.get(f"{url}/metrics").text
    return float(re.search(r"^nanovllm:num_requests_running{.*} (.*)$", text, re.MULTILINE)[1]) >= number


def test_sigterm_finishes_what_runs_and_admits_nothing(tmp_path):
    with ServerProcess(tmp_path) as server, ThreadPoolExecutor(24) as pool:
        url = server.url
        calls = [pool.submit(ask, url, index, LONG) for index in range(24)]  # more than can run at once
        assert wait_until(lambda: is_computing(url, 16), 30)
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: isinstance(ask(url, 0, LONG | {"max_tokens": 1}), httpx.ConnectError), 10)
        for call in calls:
            (choice,) = call.result()["choices"]
            assert choice["finish_reason"] == "length"
        assert server.process.wait(20) == 0, server.output


@pytest.mark.slow
def test_sigterm_waits_no_longer_than_it_is_told_to(tmp_path):
    with ServerProcess(tmp_path, "--shutdown-timeout=1") as server, ThreadPoolExecutor(8) as pool:
        url = server.url
        calls = [pool.submit(ask, url, index, ENDLESS) for index in range(8)]
        assert wait_until(lambda: is_computing(url, 8), 30)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.output
        assert time.monotonic() - start < 10
        assert all(call.result()["error"]["type"] == "server_error" for call in calls)


@pytest.mark.slow
def test_ctrl_c_while_idle(tmp_path):
    with ServerProcess(tmp_path) as server:
        assert server.url
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0 and "Traceback" not in server.output


@pytest.mark.parametrize(
    ("victim", "is_ending"),
    [("rank", False), *(pytest.param("engine", is_ending, marks=pytest.mark.slow) for is_ending in (False, True))],
)
def test_a_killed_process(tmp_path, victim, is_ending):
    """Also one that dies while the server, asked to end, waits for what runs."""
    with ServerProcess(tmp_path, "--tensor-parallel-size=2") as server, ThreadPoolExecutor(8) as pool:
        url = server.url
        calls = [pool.submit(ask, url, index, ENDLESS) for index in range(8)]
        assert wait_until(lambda: is_computing(url, 8), 60)
        (engine,) = children(server.process.pid)
        (rank,) = children(engine)
        if is_ending:
            server.process.send_signal(signal.SIGINT)
            assert wait_until(lambda: isinstance(ask(url, 0, LONG | {"max_tokens": 1}), httpx.ConnectError), 10)
        os.kill({"rank": rank, "engine": engine}[victim], signal.SIGKILL)
        assert is_ending or wait_until(lambda: httpx.get(f"{url}/health").status_code == 503, 10)
        for call in calls:
            assert call.result()["error"]["type"] == "server_error"
        assert server.process.wait(20) == 1
        assert "exit code -9" in server.output
        assert wait_until(lambda: not {engine, rank} & set(processes()), 10)


@pytest.mark.slow
def test_the_key_comes_from_the_environment(tmp_path):
    arguments = ["--served-model-name=mine", "--max-body-bytes=100", "--max-waiting-requests=3"]
    with ServerProcess(tmp_path, *arguments, env=os.environ | {API_KEY_VARIABLE: "secret"}) as server:
        models = f"{server.url}/v1/models"
        assert server.url.startswith("http://127.0.0.1:"), "nobody else's machine can reach it"
        assert httpx.get(models).status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert httpx.get(models, headers=headers).json()["data"][0]["id"] == "mine"
        body = {"prompt": "a" * 100}
        assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 413
        assert "secret" not in server.output


@pytest.mark.slow
def test_a_server_that_others_can_reach_says_so(tmp_path):
    with ServerProcess(tmp_path, "--host=0.0.0.0") as server:
        assert wait_until(lambda: "other machines can reach it" in server.output, 60)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([str(DEMO), "--max-num-seqs=0"], "max_num_seqs"),
        ([str(DEMO), "--dtype=int4"], "dtype"),
        ([str(DEMO), "--foo"], "--foo"),
        ([str(DEMO / "nowhere")], "nowhere"),
        ([], "model"),
        ([str(DEMO), "--api-key="], "--api-key"),
        ([str(DEMO), "--port=65536"], "--port must be between 0 and 65535, got 65536"),
        ([str(DEMO), "--max-waiting-requests=-1"], "--max-waiting-requests must be"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, words, capfd):
    try:
        code = main(["serve", *arguments])
    except SystemExit as end:
        code = end.code
    said = capfd.readouterr().err
    assert code in (1, 2) and words in said and "Traceback" not in said


@pytest.mark.slow
def test_a_port_in_use(tmp_path):
    with ServerProcess(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        (tmp_path / "other").mkdir()
        with ServerProcess(tmp_path / "other", f"--port={port}") as other:
            assert other.process.wait(30) > 0 and "ddress already in use" in other.output


@pytest.mark.slow
def test_sigterm_under_load_of_streams(tmp_path):
    """Streams that are under way end whole, while others keep coming."""
    with ServerProcess(tmp_path) as server:
        url, ends = server.url, []

        def stream(index: int) -> None:
            body, end = LONG | {"prompt": [index % 50 + 2], "stream": True}, None
            try:
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=90) as response:
                    end = False
                    end = "[DONE]" in response.read().decode()
            except httpx.TransportError:  # at once where the server has ended, or was about to
                pass
            ends.append(end)

        threads = [threading.Thread(target=stream, args=(index,)) for index in range(200)]
        for number, thread in enumerate(threads):
            thread.start()
            time.sleep(0.02)
            if number == 60:
                assert wait_until(lambda: is_computing(url, 16), 30)
                server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert False not in ends and ends.count(True) >= 50 and ends.count(None) >= 50
        assert server.process.wait(20) == 0


@pytest.mark.slow
def test_bench_serve(tmp_path):
    """Of random weights that have no tokenizer, as on a GPU."""
    arguments = ["--load-format=dummy", "--skip-tokenizer-init"]
    with ServerProcess(tmp_path, *arguments) as server:
        command = [sys.executable, "-m", "tools.bench_serve", "--url", server.url, "--num-requests=12", "--rate=50"]
        command += ["--concurrency=4", "--input-len=5-20", "--output-len=10-30", "--max-token-id=2000"]
        command += ["--pid", str(server.process.pid)]
        root = DEMO.parents[1]
        process = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=60)
        assert process.returncode == 0, process.stdout + process.stderr
        assert "12 of 12 requests" in process.stdout
        for line in ("time to first token", "time per output token", "the server computed"):
            assert line in process.stdout
        command[-1:] = [str(server.process.pid), "--max-token-id=5000"]
        process = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=60)
        assert process.returncode == 1 and "token ids must be between" in process.stdout
