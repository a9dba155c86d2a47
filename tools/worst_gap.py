"""The worst time between tokens when a long prompt arrives among decodes, by long_prefill_token_threshold.

    python -m tools.worst_gap                          # 64 decodes and 100,000 tokens of Qwen3-8B's shape
    python -m tools.worst_gap --model demo --max-model-len 2048 --num-decodes 8 --prompt-len 1500 --thresholds 64 256

A step computes one token of each request that decodes, and a part of the prompt. So the time between two tokens of a
request is a step's, and grows with that part, and with what of the prompt is before it. For each threshold an engine
is started anew, with random weights. What is printed are times between the tokens that `step` hands out: the median
before the prompt arrives, and of those from its arrival to its first token the median, the second worst and the
worst; then the prompt's time to first token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.dummy_model import SHAPES, write_dummy_model

if TYPE_CHECKING:
    from nanovllm import LLM

DEMO = str(Path(__file__).parents[1] / "nanovllm" / "demo")
NUM_WARM = 50  # steps of decodes that are measured before the prompt comes
PROMPT_ID = "long"


def main() -> None:
    args = parse_args()
    print(f"{args.model or args.shape}: {args.num_decodes} decodes, then a prompt of {args.prompt_len:,} tokens; ms")
    print(f"{'parts of':>8} {'decodes':>8} {'median':>8} {'second':>8} {'worst':>8} {'first token':>12}")
    with tempfile.TemporaryDirectory() as folder:
        model, options = args.model, {"max_model_len": args.max_model_len, "enable_prefix_caching": False}
        if model is None:
            write_dummy_model(args.shape, folder, with_tokenizer=False)
            # The shape's own limit is that of its training, which says nothing of time.
            overrides = {"max_position_embeddings": args.max_model_len}
            model, dummy = folder, {"load_format": "dummy", "skip_tokenizer_init": True, "hf_overrides": overrides}
            options |= dummy
        for threshold in args.thresholds:
            bounds = {"long_prefill_token_threshold": threshold, "max_num_seqs": args.num_decodes + 1}
            measure(model, options | bounds, args)


def measure(model: str, options: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the times of an engine with these options."""
    from nanovllm import LLM

    with LLM(model, **options) as llm:
        run(llm, 2, args.prompt_len // 8)  # warms up
        quiet, busy, first_token = run(llm, args.num_decodes, args.prompt_len)
    busy.sort()
    times = [statistics.median(quiet), statistics.median(busy), busy[-2], busy[-1]]
    shown = " ".join(f"{1000 * seconds:8.1f}" for seconds in times)
    print(f"{options['long_prefill_token_threshold']:>8} {shown} {1000 * first_token:12.1f}", flush=True)


def run(llm: LLM, num_decodes: int, prompt_len: int) -> tuple[list[float], list[float], float]:
    """The times between tokens before the prompt arrives and while it is computed, and until its first token; s."""
    from nanovllm import SamplingParams
    from nanovllm.sampling_params import RequestOutputKind

    params = SamplingParams(ignore_eos=True, max_tokens=llm.config.max_model_len, detokenize=False)
    params.output_kind = RequestOutputKind.DELTA
    draw, vocab_size = random.Random(0), llm.config.model_config.vocab_size
    names = [str(index) for index in range(num_decodes)]
    for name in names:
        llm.add_request(name, [draw.randrange(vocab_size) for _ in range(100)], params)
    seen: set[str] = set()
    while len(seen) < num_decodes:
        seen.update(output.request_id for output in llm.step())
    quiet, _ = tokens_until(llm, names, lambda steps, ids: steps == NUM_WARM)
    llm.add_request(PROMPT_ID, [draw.randrange(vocab_size) for _ in range(prompt_len)], params)
    start = time.perf_counter()
    busy, end = tokens_until(llm, names, lambda steps, ids: PROMPT_ID in ids)
    llm.abort_request([*names, PROMPT_ID])
    return quiet, busy, end - start


def tokens_until(llm: LLM, names: list[str], is_over: Callable[[int, set[str]], bool]) -> tuple[list[float], float]:
    """Steps until `is_over`, which is told how many there were and whose tokens the last one brought.

    Returns the longest time between tokens that ended in each step, in seconds, and the time of the last one.
    """
    last_times = dict.fromkeys(names, time.perf_counter())
    gaps: list[float] = []
    while True:
        outputs, now = llm.step(), time.perf_counter()
        ids = {output.request_id for output in outputs if output.outputs[0].token_ids}
        gaps.append(max((now - last_times[name] for name in ids if name in last_times), default=0.0))
        last_times.update(dict.fromkeys(ids, now))
        if is_over(len(gaps), ids):
            return gaps, now


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="folder or hub name, or demo: the bundled one (default: random weights)")
    model.add_argument("--shape", choices=SHAPES, default="qwen3-8b", help="of the random weights")
    parser.add_argument("--num-decodes", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=100_000)
    parser.add_argument("--max-model-len", type=int, default=131_072)
    parser.add_argument("--thresholds", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 16384])
    args = parser.parse_args()
    if args.prompt_len + 1 >= args.max_model_len:
        parser.error(f"--prompt-len must be less than --max-model-len={args.max_model_len}, got {args.prompt_len}")
    if args.model == "demo":
        args.model = DEMO
    return args


if __name__ == "__main__":
    main()
