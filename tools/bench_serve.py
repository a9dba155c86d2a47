"""Measures a running server: requests that arrive at random times, each a stream of tokens.

    python -m tools.bench_serve --url http://127.0.0.1:8000 --num-requests 256 --rate 20

Prompts are token ids, drawn at random, so that no cache helps and a server without a tokenizer will do. Arrivals are a
Poisson process of `--rate` requests a second (inf: all at once), but never more than `--concurrency` run at the same
time. Each request is sent by plain sockets, as a client that takes much time itself would measure that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tools.command_line import length_range

WARM_UP = 8  # tokens of a request that is not counted


@dataclass
class Timing:
    """One request: what it took in seconds from its sending, and the tokens that it gave."""

    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    error: str | None = None


def draw_bodies(args: argparse.Namespace) -> list[dict]:
    """The bodies of the requests, the same ones for each seed."""
    draw = random.Random(args.seed)
    bodies = []
    for _ in range(args.num_requests):
        prompt = [draw.randint(0, args.max_token_id) for _ in range(draw.randint(*args.input_len))]
        bodies.append(make_body(args, prompt, draw.randint(*args.output_len)))
    return bodies


def make_body(args: argparse.Namespace, prompt: list[int], max_tokens: int) -> dict:
    """A request for exactly so many tokens."""
    options = {"temperature": args.temperature, "ignore_eos": True, "stream_options": {"include_usage": True}}
    return {"prompt": prompt, "max_tokens": max_tokens, "stream": True} | options


async def send(args: argparse.Namespace, body: dict) -> Timing:
    """Sends a request and reads its events."""
    timing, start = Timing(), time.perf_counter()
    url = urlsplit(args.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port or 80, limit=2**24)
    data = json.dumps(body).encode()
    key = f"Authorization: Bearer {args.api_key}\r\n" if args.api_key else ""
    head = f"POST {url.path}/v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n{key}"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    received = last_event = b""
    async for line in reader:  # an event is a line; the others are the headers, and the lengths of chunks
        if line.startswith(b"data: {"):
            timing.first = timing.first or time.perf_counter() - start
            last_event = line
        elif not last_event:
            received += line
    timing.last = time.perf_counter() - start
    writer.close()
    try:
        timing.num_tokens = json.loads(last_event[len(b"data: ") :])["usage"]["completion_tokens"]
    except (ValueError, KeyError):
        timing.error = (last_event or received).decode(errors="replace").strip()
    return timing


async def send_all(args: argparse.Namespace, bodies: list[dict]) -> list[Timing]:
    """Sends requests as they arrive."""
    draw = random.Random(args.seed)
    slots = asyncio.Semaphore(args.concurrency)

    async def send_in_turn(body: dict) -> Timing:
        async with slots:
            try:
                return await send(args, body)
            except OSError as error:
                return Timing(error=str(error))

    tasks = []
    for body in bodies:
        tasks.append(asyncio.create_task(send_in_turn(body)))
        await asyncio.sleep(draw.expovariate(args.rate) if args.rate < float("inf") else 0)
    return await asyncio.gather(*tasks)


def percentiles(seconds: list[float]) -> str:
    """Mean, median and the 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return f"mean {1000 * statistics.mean(seconds):.1f}  p50 {1000 * cuts[49]:.1f}  p99 {1000 * cuts[98]:.1f} ms"


def cpu_seconds(pid: int) -> float:
    """What a process and those that it has started have computed so far."""
    parents, ticks = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            fields = file.read_text().rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(fields[1])
            ticks[int(file.parent.name)] = int(fields[11]) + int(fields[12])
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return sum(ticks[member] for member in family) / os.sysconf("SC_CLK_TCK")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--rate", type=float, default=float("inf"), help="requests a second (default: all at once)")
    parser.add_argument("--concurrency", type=int, default=2**31, help="most at the same time (default: any number)")
    parser.add_argument("--input-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--output-len", type=length_range, default=(100, 1024), metavar="N|LOW-HIGH")
    parser.add_argument("--max-token-id", type=int, default=10_000, help="of the prompts")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, if its use of the CPU is to be told")
    return parser.parse_args()


def main() -> int:
    """Prints what the requests took; returns 1 if one failed."""
    args = parse_args()
    bodies = draw_bodies(args)
    asyncio.run(send_all(args, [make_body(args, list(range(16)), WARM_UP)]))
    cpu, start = cpu_seconds(args.pid) if args.pid else 0.0, time.perf_counter()
    timings = asyncio.run(send_all(args, bodies))
    seconds = time.perf_counter() - start
    done = [timing for timing in timings if timing.error is None]
    num_tokens = sum(timing.num_tokens for timing in done)
    num_prompt_tokens = sum(len(body["prompt"]) for body in bodies)
    print(f"{len(done)} of {len(timings)} requests in {seconds:.2f} s: {len(done) / seconds:.2f} requests/s")
    print(f"output {num_tokens} tokens: {num_tokens / seconds:.1f} tokens/s; prompts {num_prompt_tokens} tokens")
    if done:
        per_token = [(t.last - t.first) / (t.num_tokens - 1) for t in done if t.num_tokens > 1]
        print("time to first token   ", percentiles([timing.first for timing in done]))
        print("time per output token ", percentiles(per_token or [0.0]))
        print("time of a request     ", percentiles([timing.last for timing in done]))
    if args.pid:
        print(f"the server computed for {(cpu_seconds(args.pid) - cpu) / seconds:.2f} s a second")
    for error in sorted({timing.error for timing in timings if timing.error is not None}):
        print("failed:", error)
    return int(len(done) < len(timings))


if __name__ == "__main__":
    raise SystemExit(main())
