"""Measures decode steps against the batch size on a GPU and draws them, with the memory floor, as two SVG plots.

    python -m tools.plot_performance                      # writes decode_step.json, decode_step.svg, throughput.svg
    python -m tools.plot_performance --from-json FILE     # only draws

To be run from the root of the repository; drawing needs matplotlib. Weights are random, every request's context is
about CONTEXT tokens, and the floor is the time to read the weights once and all contexts' keys and values at the
bandwidth measured on the spot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import draw_requests, submit
from tools.dummy_model import SHAPES, write_dummy_model
from tools.floor import cache_bytes, measure_device, step_bytes
from tools.runs import Request

if TYPE_CHECKING:
    from nanovllm import LLM

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 512
OUTPUT_LEN = 128
SETTLE_STEPS = 8


def measure_step(llm: LLM, requests: list[Request]) -> float:
    """Median seconds of the steps in which all of the requests decode."""
    seqs = submit(llm, requests, {"temperature": 0.6})
    while any(seq.first_token_time is None for seq in seqs):
        llm.step()
    times = [time.perf_counter()]
    while not any(seq.is_finished for seq in seqs):
        llm.step()
        times.append(time.perf_counter())
    while not llm.is_finished():
        llm.step()
    steps = [after - before for before, after in pairwise(times)]
    return statistics.median(steps[SETTLE_STEPS:])


def measure(shape: str) -> dict[str, Any]:
    """Seconds of a decode step and of its floor for each batch size."""
    from nanovllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        write_dummy_model(shape, folder, with_tokenizer=False)
        with LLM(folder, load_format="dummy", max_num_seqs=max(BATCH_SIZES), max_model_len=2 * CONTEXT) as llm:
            config, dtype = llm.config.model_config, llm.config.dtype
            lens = {"input_len": (CONTEXT - OUTPUT_LEN // 2,) * 2, "output_len": (OUTPUT_LEN,) * 2, "shared_prefix": 0}
            seconds = []
            for index, size in enumerate(BATCH_SIZES):
                args = argparse.Namespace(num_seqs=size, params={}, params_every=1, **lens)
                seconds.append(measure_step(llm, draw_requests(args, config.vocab_size, index)))
                print(f"batch {size:3d}: {1000 * seconds[-1]:.3f} ms, {size / seconds[-1]:,.0f} tok/s", flush=True)
    bandwidth, _ = measure_device(dtype)
    kv = cache_bytes(config, dtype, [CONTEXT])
    floor = [(step_bytes(config, dtype, size) + size * kv) / bandwidth for size in BATCH_SIZES]
    return {"shape": shape, "context": CONTEXT, "batch_sizes": BATCH_SIZES, "seconds": seconds, "floor": floor}


def draw(figures: dict[str, Any], folder: Path) -> None:
    """Writes decode_step.svg and throughput.svg."""
    from matplotlib import pyplot, ticker

    sizes, curves = figures["batch_sizes"], (("nano-vllm", figures["seconds"]), ("memory bound", figures["floor"]))
    for name, label, scale in (
        ("decode_step", "decode step (ms)", lambda size, seconds: 1000 * seconds),
        ("throughput", "output tok/s", lambda size, seconds: size / seconds),
    ):
        figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
        for (curve, seconds), style in zip(curves, ("o-", "k--"), strict=True):
            axes.plot(sizes, [scale(*point) for point in zip(sizes, seconds, strict=True)], style, label=curve)
        axes.set(xlabel="batch size", ylabel=label, title=f"{figures['shape']}, context {figures['context']} tokens")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, sizes)
        axes.yaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"{name}.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="draw these figures, measure nothing")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    if args.from_json:
        figures = json.loads(args.from_json.read_text())
    else:
        figures = measure(args.shape)
        (args.out / "decode_step.json").write_text(json.dumps(figures, indent=2) + "\n")
    draw(figures, args.out)


if __name__ == "__main__":
    main()
