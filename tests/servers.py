"""A server for tests: the demo behind real HTTP, in a thread of this process or in a process of its own.

Needs the packages that the extra [test] brings.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from faults import wait_until

import nanovllm.demo
from nanovllm import AsyncLLM
from nanovllm.server.app import build_app

DEMO = Path(nanovllm.demo.__file__).parent
TEMPLATE = """{% if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 600,
    "max_num_seqs": 16,
}


def make_folder(path: Path) -> str:
    """The demo with a chat template that knows of tools, and of reasoning as newer models do."""
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(DEMO / name, path)
    config = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8")) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(path)


@contextmanager
def serving(engine: AsyncLLM, **limits) -> Iterator[str]:
    """Serves an engine on a free port; yields the address."""
    limits = {"api_keys": [], "max_body_bytes": 2**20, "max_waiting_requests": 2000} | limits
    config = uvicorn.Config(build_app(engine, "demo", **limits), port=0, log_level="warning", access_log=False)
    listener = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    assert wait_until(lambda: server.started, 20)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


class ServerProcess:
    """`nanovllm serve`, whose output goes to a file."""

    def __init__(self, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = folder / "server.log"
        options = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        command = [sys.executable, "-m", "nanovllm", "serve", str(DEMO), "--port=0", *options, *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def url(self) -> str:
        """The address, once requests are served."""
        assert wait_until(lambda: "is served at" in self.output or self.process.poll() is not None, 60), self.output
        url = self.output.partition("is served at ")[2].split()[0]
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/health")
                return url
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(self.output)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
