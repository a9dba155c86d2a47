"""bench.py and example.py as users run them, on CPU with the demo checkpoint; bench.py's draws and counts."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanovllm.checkpoint.model_config import ModelConfig

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
bench = importlib.import_module("bench")
command_line = importlib.import_module("tools.command_line")
dummy_model = importlib.import_module("tools.dummy_model")
floors = importlib.import_module("tools.floor")
other_engines = importlib.import_module("tools.other_engines")
step_profile = importlib.import_module("tools.step_profile")
weight_format = importlib.import_module("tools.weight_format").weight_format

VOCAB_SIZE = 3328  # the demo's
TINY = {"num_seqs": 4, "input_len": (8, 16), "output_len": (30, 40), "shared_prefix": 5}
DEFAULT = {"num_seqs": 256, "input_len": (100, 1024), "output_len": (100, 1024), "shared_prefix": 0}


def draw(options: dict, vocab_size: int, repeat: int = 0) -> list[bench.Request]:
    return bench.draw_requests(argparse.Namespace(**{"params": {}, "params_every": 1} | options), vocab_size, repeat)


def run(script: str, *arguments: str) -> str:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    process = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_tiny(folder: Path, *arguments: str) -> dict:
    lens = ["--num-seqs", "4", "--input-len", "8-16", "--output-len", "30-40", "--shared-prefix", "5"]
    run("bench.py", "--model", "demo", *lens, "--json", str(folder / "result.json"), *arguments)
    return json.loads((folder / "result.json").read_text())


def test_figures_are_consistent(tmp_path):
    trace = tmp_path / "trace.json"
    engine_options = ("--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "16")
    own = {"n": 2, "presence_penalty": 0.5}
    sampling = ("--params", json.dumps(own), "--params-every", "3")
    result = run_tiny(tmp_path, "--repeats", "2", "--profile", str(trace), *engine_options, *sampling)
    requests = draw(TINY | {"params": own, "params_every": 3}, vocab_size=VOCAB_SIZE)
    assert [request.params for request in requests] == [own, {}, {}, own]
    assert result["prompt_tokens"] == sum(len(request.prompt) for request in requests)
    assert len(result["runs"]) == 2
    for figures in result["runs"]:
        assert figures["output_tokens"] == sum(request.max_tokens * request.params.get("n", 1) for request in requests)
        assert figures["tokens_per_second"] == pytest.approx(figures["output_tokens"] / figures["seconds"])
        assert 0 < figures["time_to_first_token"] < figures["time_to_all_first_tokens"] < figures["seconds"]
        # The longest output has at most 40 tokens.
        assert 0 < figures["time_per_output_token"] < figures["seconds"] / 20
    rates = [figures["tokens_per_second"] for figures in result["runs"]]
    assert result["median_tokens_per_second"] == pytest.approx(sum(rates) / 2)
    floor = result["floor"]
    assert 1e9 < floor["bandwidth"] < 1e12 and 0 < floor["seconds"] < min(each["seconds"] for each in result["runs"])
    assert result["import_seconds"] > 0
    assert result["start_up_seconds"] > 0
    assert result["peak_memory_bytes"] > 2**27  # torch alone takes more
    assert any(event.get("name") == "aten::mm" for event in json.loads(trace.read_text())["traceEvents"])


def test_drafts_are_counted(tmp_path):
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    options = ("--speculative-config", json.dumps(speculation), "--block-size", "16", "--max-model-len", "256")
    (figures,) = run_tiny(tmp_path, "--temperature", "0", *options)["runs"]
    assert figures["output_tokens"] == sum(request.max_tokens for request in draw(TINY, VOCAB_SIZE))
    assert 0 < figures["num_accepted_tokens"] < figures["num_draft_tokens"]
    assert "10 of 1,234 drafts accepted" in bench.describe(bench.Run(9, 1.0, 9.0, None, None, 1234, 10))


def test_hf_generates_as_many_tokens(tmp_path):
    result = run_tiny(tmp_path, "--engine", "hf")
    assert result["engine"] == "hf"
    assert result["runs"][0]["output_tokens"] == sum(request.max_tokens for request in draw(TINY, VOCAB_SIZE))


def test_llamacpp_completes_one_after_the_other(monkeypatch):
    """Driven as its package is, which is not installed here: the same prompts, as many tokens, text for all."""

    class Llama:
        def __init__(self, model: str, **options) -> None:
            self.options, self.prompts, self.texts = options, [], []

        def generate(self, prompt: list[int], **how):
            self.prompts.append((prompt, how))
            return iter(range(100))

        def detokenize(self, tokens: list[int]) -> bytes:
            self.texts.append(tokens)
            return b""

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    llm = other_engines.start_llamacpp("m.gguf", {"tensor_parallel_size": 1, "max_model_len": 99})
    assert llm.options["n_ctx"] == 99
    result = other_engines.run_llamacpp(llm, draw(TINY, VOCAB_SIZE), {"temperature": 0, "top_p": 1.0, "top_k": -1})
    assert [prompt for prompt, _ in llm.prompts] == [request.prompt for request in draw(TINY, VOCAB_SIZE)]
    assert all(how == {"temp": 0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} for _, how in llm.prompts)
    assert [len(tokens) for tokens in llm.texts] == [request.max_tokens for request in draw(TINY, VOCAB_SIZE)]
    assert result.output_tokens == sum(map(len, llm.texts)) and result.time_to_first_token < result.seconds
    for model, options in (("folder", {}), ("m.gguf", {"dtype": "float32"}), ("m.gguf", {"tensor_parallel_size": 2})):
        with pytest.raises(ValueError, match="--engine llamacpp"):
            other_engines.start_llamacpp(model, {"tensor_parallel_size": 1} | options)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_an_engine_that_is_not_installed():
    command = [sys.executable, str(ROOT / "bench.py"), "--engine", "llamacpp", "--model", "demo"]
    process = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    assert process.returncode == 1
    assert "--engine llamacpp needs the package llama-cpp-python: pip install llama-cpp-python" in process.stderr


def test_example_gives_the_demos_answers():
    output = run("example.py")
    with open(ROOT / "nanovllm" / "demo" / "questions.jsonl", encoding="utf-8") as file:
        answers = {entry["question"]: entry["answer"] for entry in map(json.loads, file)}
    asked = [line.removeprefix("Question: ") for line in output.splitlines() if line.startswith("Question: ")]
    assert asked[:2] == ["introduce yourself", "list all prime numbers within 100"]
    for question in asked:
        assert f"Question: {question}\nAnswer: {answers[question]}\n" in output
    assert "tok/s" in output


def test_example_without_a_chat_template(tmp_path, monkeypatch, capsys):
    demo = ROOT / "nanovllm" / "demo"
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(demo / name)
    config = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["example.py", "--model", str(tmp_path)])
    importlib.import_module("example").main()
    assert capsys.readouterr().out.count("Answer: ") == 4


def test_default_draws_are_the_public_benchmarks():
    requests = draw(DEFAULT, vocab_size=151936)
    assert sum(request.max_tokens for request in requests) == 133_966
    assert sum(len(request.prompt) for request in requests) == 142_827
    assert requests[0].prompt[0] == 6311  # the second draw of seed 0; the first is its length
    again = draw(DEFAULT, vocab_size=151936, repeat=1)
    assert [len(r.prompt) for r in again] == [len(r.prompt) for r in requests]
    assert [r.max_tokens for r in again] == [r.max_tokens for r in requests]
    assert not any(a.prompt[:16] == b.prompt[:16] for a, b in zip(again, requests, strict=True))


def test_draws_share_a_prefix_and_stay_in_the_vocabulary():
    requests = draw(TINY | {"num_seqs": 50, "shared_prefix": 7}, vocab_size=100)
    assert len({tuple(request.prompt[:7]) for request in requests}) == 1
    assert len({tuple(request.prompt[:9]) for request in requests}) > 40
    assert max(max(request.prompt) for request in requests) == 99


def test_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "measure_device", lambda dtype: (4e12, 800e12))
    dummy_model.write_dummy_model("qwen3-0.6b", str(tmp_path), with_tokenizer=False)
    config = ModelConfig.from_folder(str(tmp_path))
    layers, _, _, head = floors.count_weights(config)
    assert layers + head == 596_049_920 - 65_536  # of the published checkpoint, less its norms
    floor = floors.Floor.measure(config, "bfloat16", draw(DEFAULT, 151936), prefix=0, num_gpus=1)
    assert floor.kv_bytes == 13_853_760_356_352
    assert floor.weight_bytes == 1023 * 2 * (layers + head)
    assert floor.seconds == pytest.approx((floor.kv_bytes + floor.weight_bytes) / 4e12 + floor.prefill_flops / 800e12)
    assert floor.prefill_seconds == pytest.approx(floor.prefill_flops / 800e12)
    floor = floors.Floor.measure(config, "bfloat16", draw(DEFAULT, 151936), 0, 1, kv_cache_dtype="fp8")
    assert floor.kv_bytes == 13_853_760_356_352 // 2
    # Three decode steps of one request, then two requests of which the second computes one token of its own.
    one = floors.Floor.measure(config, "bfloat16", [bench.Request([1] * 10, 4)], prefix=0, num_gpus=1)
    assert one.kv_bytes == 114_688 * (11 + 12 + 13)
    two = floors.Floor.measure(config, "bfloat16", [bench.Request([1] * 10, 4)] * 2, prefix=9, num_gpus=2)
    assert two.weight_bytes == one.weight_bytes
    assert two.prefill_flops - one.prefill_flops == 2 * (layers + head) + 4 * 28 * 16 * 128 * 10  # attended pairs


def test_floor_of_experts_and_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "measure_device", lambda dtype: (4.4e12, 790e12))
    dummy_model.write_dummy_model("qwen3-30b-a3b", str(tmp_path), with_tokenizer=False)
    config = ModelConfig.from_folder(str(tmp_path))
    layers, expert, routers, head = floors.count_weights(config)
    layers += routers
    assert layers + 128 * expert + 2 * head == pytest.approx(30.53e9, rel=1e-3)  # parameters of the published model
    assert floors.step_bytes(config, "bfloat16", 1) == 2 * (layers + 8 * expert + head)
    assert floors.step_bytes(config, "bfloat16", 10**6) == 2 * (layers + 128 * expert + head)
    # With two requests, an expert is spared with probability (15 / 16)^2.
    assert floors.step_bytes(config, "bfloat16", 2) == pytest.approx(2 * (layers + (128 - 112.5) * expert + head))
    dummy_model.write_dummy_model("mistral-7b", str(tmp_path), with_tokenizer=False)
    config = ModelConfig.from_folder(str(tmp_path))
    assert floors.cache_bytes(config, "bfloat16", [100, 4096, 30000]) == 131_072 * (100 + 2 * 4096)
    assert floors.attended_pairs(config, 4098) == 32 * (4096 * 4097 // 2 + 2 * 4096)


@pytest.mark.parametrize(
    ("name", "option", "weight_bytes", "group_bytes", "group", "in_8_bits"),
    [
        (None, None, 2, 0, 1, False),
        (None, "fp8", 1, 4, None, True),
        (None, "int8", 1, 4, None, False),
        (None, "int4", 0.5, 4, 32, False),
        ("fp8-block", None, 1, 4, 128**2, True),
        ("int8", None, 1, 4, None, True),
        ("int4", None, 0.5, 2, 128, False),
        ("awq", None, 0.5, 3, 128, False),
    ],
)
def test_floor_of_quantised_weights(tmp_path, monkeypatch, name, option, weight_bytes, group_bytes, group, in_8_bits):
    monkeypatch.setattr(floors, "measure_device", lambda dtype: (4.4e12, 790e12))
    monkeypatch.setattr(floors, "measure_8_bit_product", lambda: 1500e12)
    requests = draw(DEFAULT, vocab_size=151936)
    for shape in ("qwen3-8b", "qwen3-30b-a3b"):
        dummy_model.write_dummy_model(shape, str(tmp_path), False, dummy_model.QUANTIZATIONS.get(name))
        config = ModelConfig.from_folder(str(tmp_path))
        quantized = weight_format(config, option)
        weights = floors.count_weights(config)
        layer_bytes = weight_bytes + group_bytes / (group or config.hidden_size)
        read = weights.layers + 8 * weights.expert
        assert floors.step_bytes(config, "bfloat16", 1, quantized) == pytest.approx(
            layer_bytes * read + 2 * (weights.routers + weights.head)
        )
        floor = floors.Floor.measure(config, "bfloat16", requests, 0, 1, quantized=quantized)
        plain = floors.Floor.measure(config, "bfloat16", requests, 0, 1)
        prefill_seconds = floor.prefill_flops / 790e12 + floor.prefill_flops_in_8_bits / 1500e12
        assert floor.prefill_seconds == pytest.approx(prefill_seconds)
        assert floor.prefill_flops + floor.prefill_flops_in_8_bits == plain.prefill_flops
        assert floor.prefill_flops_in_8_bits == (2 * read * 142_827 if in_8_bits else 0)
        assert floor.seconds == pytest.approx(
            (floor.kv_bytes + floor.weight_bytes) / 4.4e12
            + floor.prefill_flops / 790e12
            + floor.prefill_flops_in_8_bits / 1500e12
        )


def test_floors_that_are_quoted(tmp_path):
    """Qwen3-8B, the weights of one request's step at 4.40 TB/s, in tokens a second."""
    rates = {}
    for name in (None, "fp8-block", "int4"):
        dummy_model.write_dummy_model("qwen3-8b", str(tmp_path), False, dummy_model.QUANTIZATIONS.get(name))
        config = ModelConfig.from_folder(str(tmp_path))
        rates[name] = round(4.4e12 / floors.step_bytes(config, "bfloat16", 1, weight_format(config, None)))
    assert rates == {None: 291, "fp8-block": 537, "int4": 912}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"quant_method": "fp8", "activation_scheme": "static"}, (8, None, 4, True)),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1, "sym": False}, (8, None, 3, False)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, (4, 32, 2, False)),
        ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": False}, (4, 64, 2, False)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, (4, 64, 3, False)),
    ],
)
def test_formats_of_real_checkpoints(tmp_path, facts, expected):
    dummy_model.write_dummy_model("qwen3-8b", str(tmp_path), False, facts)
    assert weight_format(ModelConfig.from_folder(str(tmp_path)), None) == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}, (8, None, 4, True)),
        ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}, (8, 16384, 4, True)),
        ({"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}, (4, 128, 2, False)),
        ({"num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": False}, (4, 128, 3, False)),
    ],
)
def test_formats_of_compressed_tensors(tmp_path, weights, expected):
    activations = {"num_bits": 8, "dynamic": True} if weights["num_bits"] == 8 else None
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    facts = {"quant_method": "compressed-tensors", "config_groups": groups}
    dummy_model.write_dummy_model("qwen3-8b", str(tmp_path), False, facts)
    assert weight_format(ModelConfig.from_folder(str(tmp_path)), None) == expected


def test_a_format_without_a_floor(tmp_path):
    dummy_model.write_dummy_model("qwen3-8b", str(tmp_path), False, {"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="no floor is known of weights by 'bitsandbytes'"):
        weight_format(ModelConfig.from_folder(str(tmp_path)), None)


def test_trace_summary_counts_overlaps_once(tmp_path):
    events = [("a", 0, 4), ("b", 2, 4), ("b", 8, 2)]
    trace = [{"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur} for name, ts, dur in events]
    other = {"ph": "X", "cat": "cpu_op", "name": "c", "ts": 0, "dur": 100}
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [*trace, other]}))
    busy, *longest = step_profile.summarise_trace(str(tmp_path / "trace.json"), {"kernel"}).splitlines()
    assert busy == "busy for 80.0% of 0.010 ms"
    assert [line.split() for line in longest] == [["0.006", "ms", "2", "x", "b"], ["0.004", "ms", "1", "x", "a"]]


@pytest.mark.parametrize("lens", ["0", "9-8", "4-", "x", "-3"])
def test_bad_lengths_are_refused(lens, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", f"--input-len={lens}"])
    with pytest.raises(SystemExit):
        command_line.parse_args()
    assert "--input-len" in capsys.readouterr().err.splitlines()[-1]


def test_only_given_engine_options_reach_the_engine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--no-prefix-caching", "--block-size", "32", "--top-k", "5"])
    args, options = command_line.parse_args()
    assert options == {"tensor_parallel_size": 1, "enable_prefix_caching": False, "kvcache_block_size": 32}
    assert args.top_k == 5


@pytest.mark.parametrize("name", ["fp8", *dummy_model.QUANTIZATIONS])
def test_random_weights_are_stored_as_asked(monkeypatch, name):
    """fp8 is an option of the engine, the other formats are those of a checkpoint."""
    seen = []

    def measure(args, model, options):
        stored = json.loads(Path(model, "config.json").read_text()).get("quantization_config")
        seen.append((stored, options.get("quantization")))

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "print_summary", lambda result: None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--no-tokenizer", "--quantization", name])
    bench.main()
    assert seen == [(None, "fp8") if name == "fp8" else (dummy_model.QUANTIZATIONS[name], None)]


def test_the_engine_reads_what_it_is_given_of_a_real_folder(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "measure", lambda args, model, options: seen.append(options["quantization"]))
    monkeypatch.setattr(bench, "print_summary", lambda result: None)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--model", "demo", "--quantization", "int4"])
    bench.main()
    assert seen == ["int4"]


@pytest.mark.parametrize("arguments", [["--quantization", "int3"], ["--engine", "hf", "--quantization", "fp8"]])
def test_quantizations_that_there_are_not(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit):
        command_line.parse_args()
    assert "--quantization" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_with_quantised_weights(tmp_path):
    result = run_tiny(tmp_path, "--quantization", "fp8")
    assert result["runs"][0]["output_tokens"] == sum(request.max_tokens for request in draw(TINY, VOCAB_SIZE))
