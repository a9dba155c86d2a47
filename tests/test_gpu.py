"""On a GPU: greedy tokens of random float32 models, draws, memory, and logits in bf16 as good as transformers'."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from checkpoints import FAMILIES, mixed_prompts, random_prompt
from engines import MAX_TOKENS, SCENARIOS, Trace, check_scenario, engine, expected, generate, scenario_options, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint.files import read_json
from nanovllm.layers.attention import Attention
from nanovllm.parallel.peer_memory import MAX_PART_ROWS
from nanovllm.speculative import policy
from nanovllm.utils.context import Context

pytestmark = pytest.mark.gpu
GRAPHS = pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU that knows FP8"
)
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FLOAT32 = {"device": "cuda", "dtype": "float32", "gpu_memory_utilization": 0.5}


@GRAPHS
@BACKENDS
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_greedy_tokens(checkpoint, scenario, backend, enforce_eager):
    options = FLOAT32 | {"attention_backend": backend, "enforce_eager": enforce_eager}
    check_scenario(checkpoint("qwen3"), scenario, 16, **options)


@GRAPHS
@BACKENDS
def test_greedy_tokens_with_drafts(checkpoint, monkeypatch, backend, enforce_eager):
    """Of texts that repeat themselves; some drafts are accepted, some are not."""
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)
    checkpoint, loop = checkpoint("qwen3"), random_prompt(70, 5)
    prompts = [loop * 9, random_prompt(71, 40) * 2, *mixed_prompts()]
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    options = FLOAT32 | {"attention_backend": backend, "enforce_eager": enforce_eager, "num_kvcache_blocks": 25}
    with engine(checkpoint.path, **options, speculative_config=config) as llm:
        results = generate(llm, prompts)
    assert tokens(results) == expected(checkpoint, prompts)
    num_checked = sum(result.num_draft_tokens for result in results)
    assert 0 < sum(result.num_accepted_tokens for result in results) < num_checked


@needs_two_gpus
def test_ranks_with_drafts(checkpoint, monkeypatch):
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)
    config = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    check_scenario(
        checkpoint("qwen3"), "all_at_once", 16, **FLOAT32, speculative_config=config, tensor_parallel_size=2
    )


@GRAPHS
@BACKENDS
@pytest.mark.parametrize("drafter", ["qwen3", "llama"])
def test_greedy_tokens_with_a_draft_model(checkpoint, monkeypatch, drafter, backend, enforce_eager):
    """The model itself, whose drafts are all right, and another one."""
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)
    checkpoint, path, prompts = checkpoint("qwen3"), checkpoint(drafter).path, mixed_prompts()
    config = {"model": path, "num_speculative_tokens": 4}
    options = FLOAT32 | {"attention_backend": backend, "enforce_eager": enforce_eager, "num_kvcache_blocks": 25}
    with engine(checkpoint.path, **options, speculative_config=config) as llm:
        for _ in range(2):
            results = generate(llm, prompts)
            assert tokens(results) == expected(checkpoint, prompts)
    num_checked = sum(result.num_draft_tokens for result in results)
    num_accepted = sum(result.num_accepted_tokens for result in results)
    assert num_checked > 0 and (num_accepted == num_checked) == (drafter == "qwen3")


@needs_two_gpus
def test_ranks_with_a_draft_model(checkpoint, monkeypatch):
    monkeypatch.setattr(policy, "pays", lambda records, num_drafts: True)
    config = {"model": checkpoint("llama").path, "num_speculative_tokens": 3}
    check_scenario(
        checkpoint("qwen3"), "all_at_once", 16, **FLOAT32, speculative_config=config, tensor_parallel_size=2
    )


@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family(checkpoint, family, block_size):
    check_scenario(checkpoint(family), "all_at_once", block_size, **FLOAT32)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral"])
@pytest.mark.parametrize("scenario", ["plain", "preempted", "all_at_once"])
def test_steps_with_prompts_in_graphs(checkpoint, scenario, family):
    """They are captured when their like comes for the second time, and replayed from then on."""
    checkpoint, prompts = checkpoint(family), mixed_prompts()
    with engine(checkpoint.path, **FLOAT32, **scenario_options(scenario, 256)) as llm:
        graphs = llm.ranks.runner.graphs
        for _ in range(3):
            llm.reset_prefix_cache()
            assert tokens(generate(llm, prompts)) == expected(checkpoint, prompts)
        captured = [shape for shape in graphs.captured if shape.num_prompts]
        assert any(shape.num_prompts > 1 for shape in captured)
        assert scenario == "plain" or any(shape.num_decodes for shape in captured)


@pytest.mark.parametrize("num_prompts", [1, 9])
def test_flash_attn_with_prompts_in_graphs(checkpoint, num_prompts):
    """Only short prompts alone are in graphs: not sequences without tokens, of which it would read keys."""
    prompts = mixed_prompts()[:num_prompts]
    options = FLOAT32 | {"dtype": "bfloat16", "attention_backend": "flash_attn", "kvcache_block_size": 256}
    with engine(checkpoint("qwen3").path, **options) as llm:
        results = [tokens(generate(llm, prompts)) for _ in range(3)]
        assert results[0] == results[1] == results[2]
        assert all(shape.num_decodes == 0 for shape in llm.ranks.runner.graphs.captured if shape.num_prompts)


@pytest.mark.parametrize("async_scheduling", [True, False], ids=["async", "sync"])
def test_prefixes_of_earlier_calls(checkpoint, async_scheduling):
    checkpoint, prompts = checkpoint("qwen3"), mixed_prompts()
    with engine(checkpoint.path, **FLOAT32, async_scheduling=async_scheduling) as llm:
        generate(llm, prompts)
        results = generate(llm, prompts)
        assert tokens(results) == expected(checkpoint, prompts)
        hits = [result["num_cached_tokens"] for result in results]
        assert hits == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


@pytest.mark.parametrize("scenario", ["plain", "all_at_once"])
@pytest.mark.parametrize(
    ("family", "num_ranks"),
    [
        *(("qwen3", 2), ("llama_bias", 2), ("mistral", 4)),
        *(("qwen3_moe", 2), ("qwen2_moe", 2), ("mixtral", 2), ("gemma3", 2), ("olmo2", 2), ("granite", 2)),
        *(("gemma2", 2), ("mistral_window", 2), ("phi3", 2), ("qwen2_window", 2)),
    ],
)
def test_several_ranks(checkpoint, family, scenario, num_ranks):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    check_scenario(checkpoint(family), scenario, 16, **FLOAT32, tensor_parallel_size=num_ranks)


@pytest.mark.parametrize(("family", "num_ranks"), [("qwen3", 2), ("mistral", 4)])
def test_several_ranks_share_the_rows_of_a_sum(checkpoint, family, num_ranks):
    """In a step of so many prompts that each rank sums some of the rows only."""
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    checkpoint, prompts = checkpoint(family), [random_prompt(seed, 250 + seed) for seed in range(12)]
    with engine(checkpoint.path, **FLOAT32, tensor_parallel_size=num_ranks) as llm:
        trace = Trace(llm)
        assert tokens(generate(llm, prompts)) == [checkpoint.greedy(prompt, MAX_TOKENS) for prompt in prompts]
        assert trace.most_tokens > MAX_PART_ROWS


@needs_two_gpus
def test_ranks_of_a_fresh_process_are_forks(checkpoint):
    """So that they need not import torch; where CUDA is in use, they are spawned."""
    script = """if True:
        import sys
        from nanovllm import LLM, SamplingParams
        for _ in range(2):
            with LLM(sys.argv[1], tensor_parallel_size=2, gpu_memory_utilization=0.3, max_model_len=300) as llm:
                print(type(llm.ranks.processes[0]).__name__, llm.generate([[5, 6]], SamplingParams(max_tokens=3)))
    """
    command = [sys.executable, "-c", script, checkpoint("qwen3").path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ForkProcess", "SpawnProcess"], done.stderr


@GRAPHS
def test_draws_are_those_of_the_cpu(checkpoint, enforce_eager):
    """With seeds, plain and filtered rows draw the same tokens on any device, in a batch of any size."""
    prompts = mixed_prompts()
    params = [
        SamplingParams(temperature=0.8, seed=seed, max_tokens=16, ignore_eos=True)
        if seed % 2
        else SamplingParams(
            temperature=1.2, top_k=40, top_p=0.9, min_p=0.01, seed=seed, max_tokens=16, ignore_eos=True
        )
        for seed in range(len(prompts))
    ]
    path = checkpoint("qwen3").path
    with engine(path) as llm:
        want = [result["token_ids"] for result in generate(llm, prompts, params)]
    with engine(path, **FLOAT32, enforce_eager=enforce_eager, num_kvcache_blocks=19) as llm:
        trace = Trace(llm)
        got = [result["token_ids"] for result in generate(llm, prompts, params)]
        assert trace.num_preemptions > 0
        alone = [generate(llm, [prompt], param)[0]["token_ids"] for prompt, param in zip(prompts, params, strict=True)]
    assert got == alone
    # The logarithms of two devices differ in their last bits, which may decide a draw once in a long while.
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= len(want) - 1


@pytest.mark.parametrize("layer_options", [{}, {"window": 40}, {"window": 40, "soft_cap": 0.5}], ids=str)
@pytest.mark.parametrize("q_len", [1, 5], ids=["decode", "prefill"])
@pytest.mark.parametrize("backend", ["triton", "torch", "flash_attn"])
def test_what_a_sequence_has_not_or_no_more_is_not_seen(backend, q_len, layer_options):
    """What lies behind its end, or in pages before its window, may be NaN, of a sequence that failed and left them."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    lens = torch.tensor([300, 5, 256, 511], dtype=torch.int32, device="cuda")
    starts = torch.arange(5, dtype=torch.int32, device="cuda") * q_len
    context = Context(
        slot_mapping=torch.full((4 * q_len,), -1, dtype=torch.int32, device="cuda"),
        context_lens=lens,
        block_tables=torch.arange(8, dtype=torch.int32, device="cuda").view(4, 2),
        num_decodes=4 if q_len == 1 else 0,
        cu_seqlens_q=starts,
        cu_seqlens_k=torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(),
        max_seqlen_q=q_len,
        logits_indices=None,
        decode_groups={},
    )
    layer = Attention(64, backend, torch.randn(64, 64, device="cuda"), **layer_options)
    layer.semaphores = torch.zeros(8, dtype=torch.int32, device="cuda")
    qkv = torch.randn(4 * q_len, 8 * 64, device="cuda", dtype=torch.bfloat16)
    positions = torch.arange(4 * q_len, dtype=torch.int32, device="cuda")
    cache = torch.randn(2, 8, 256, 2, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.arange(512, device="cuda")
    is_unseen = slots >= lens[:, None]
    if layer.window:
        oldest = (lens - q_len + 1 - layer.window).clamp(min=0)
        is_unseen |= slots < (oldest // 256 * 256)[:, None]
    outputs = []
    for filling in (0.0, float("nan")):
        cache.view(2, 4, 512, 2, 64)[:, is_unseen] = filling
        layer.k_cache, layer.v_cache = cache
        outputs.append(layer(qkv, positions, context, None, None))
    assert outputs[0].isfinite().all() and torch.equal(*outputs)


def test_memory_comes_back(checkpoint):
    """An engine that is closed leaves its caller the memory of the GPU."""
    generate_one = SamplingParams(temperature=0, max_tokens=2)
    path = checkpoint("qwen3").path
    used = []
    for _ in range(3):
        with engine(path, **FLOAT32) as llm:
            generate(llm, [random_prompt(1, 20)], generate_one)
        del llm
        gc.collect()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1] == used[2]
    assert used[-1] < 2**28


@needs_two_gpus
def test_two_ranks_leave_nothing(checkpoint):
    """One engine after the other, each on fresh ranks, and no GPU has less memory afterwards."""
    used = []
    for _ in range(3):
        with engine(checkpoint("qwen3").path, **FLOAT32, tensor_parallel_size=2) as llm:
            assert llm.ranks.tp.peer_memory is not None
            generate(llm, [random_prompt(1, 20)], SamplingParams(temperature=0, max_tokens=2))
        del llm
        gc.collect()
        used.append([total - free for free, total in map(torch.cuda.mem_get_info, range(2))])
    assert all(abs(later - first) < 2**28 for first, later in zip(used[0], used[-1], strict=True))


@needs_two_gpus
def test_a_killed_rank_ends_the_engine(checkpoint):
    """Kernels of rank 0 that wait for the dead one's part of a sum end too."""
    with engine(checkpoint("qwen3").path, **FLOAT32, tensor_parallel_size=2) as llm:
        killed = []

        def kill() -> None:
            killed.append(time.monotonic())
            llm.ranks.processes[0].kill()

        threading.Timer(0.5, kill).start()
        with pytest.raises(RuntimeError, match="rank 1 ended with exit code -9"):
            while True:
                llm.generate([list(random_prompt(1, 20))] * 8, SamplingParams(ignore_eos=True), use_tqdm=False)
        assert time.monotonic() - killed[0] < 5


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Casts the weights only: the rotary frequencies stay float32, as when transformers loads a checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture(scope="module")
def random_qwen3(tmp_path_factory):
    """A bf16 checkpoint of Qwen3-0.6B's shape: its folder, and transformers' model on the GPU."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        model = cast(AutoModelForCausalLM.from_config(config), torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = tmp_path_factory.mktemp("random_qwen3")
    model.save_pretrained(folder)
    return str(folder), model


NUM_STEPS = 6


def engine_logits(folder: str, prompts: list[tuple[int, ...]], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prefill and some decodes [steps, B, vocab], and the tokens generated [B, steps].

    The prompts are of equal length, so that the rows stay in their order.
    """
    params = SamplingParams(temperature=0, max_tokens=NUM_STEPS, ignore_eos=True)
    recorded = []
    with LLM(folder, device="cuda", dtype="bfloat16", max_model_len=256, enforce_eager=True, **options) as llm:
        model = llm.ranks.runner.model
        compute_logits = model.compute_logits

        def record(*hidden_states: object) -> torch.Tensor:
            logits = compute_logits(*hidden_states)
            recorded.append(logits[: len(prompts)].float().clone())
            return logits

        model.compute_logits = record
        results = llm.generate([list(prompt) for prompt in prompts], params, use_tqdm=False)
        del model.compute_logits
    assert len(recorded) == NUM_STEPS
    return torch.stack(recorded), torch.tensor([result["token_ids"] for result in results], device="cuda")


@torch.inference_mode()
def reference_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits that predict the last NUM_STEPS of tokens [B, N]: [steps, B, vocab]."""
    logits = [model(row[None, :-1], use_cache=False).logits[0, -NUM_STEPS:].float() for row in ids]
    return torch.stack(logits, dim=1)


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    return ((logits - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("backend", ["triton", "torch", "flash_attn"])
@pytest.mark.parametrize(("num_prompts", "length"), [(1, 128), (16, 200)])
def test_logits_are_as_good_as_those_of_transformers(random_qwen3, backend, num_prompts, length):
    """In bf16, against float32: errors at most 1.2 times those of transformers in bf16."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
    folder, model = random_qwen3
    prompts = [random_prompt(seed, length, 151_936) for seed in range(num_prompts)]
    # Blocks of 256 tokens, which hold prompt and answer, and no more: the models compared need room too.
    logits, generated = engine_logits(folder, prompts, attention_backend=backend, num_kvcache_blocks=64)
    ids = torch.cat([torch.tensor(prompts, device="cuda"), generated], dim=1)
    ours, theirs = logits, reference_logits(model, ids)
    reference = reference_logits(cast(model, torch.float32), ids)
    cast(model, torch.bfloat16)  # the weights were bf16 numbers: nothing is lost on the way there and back
    for step in (slice(0, 1), slice(1, None)):  # prefill, decode
        error = relative_error(theirs[step], reference[step])
        assert 1e-4 < error < 0.1
        assert relative_error(ours[step], reference[step]) <= 1.2 * error


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@needs_fp8
def test_greedy_tokens_of_an_fp8_cache(checkpoint, enforce_eager):
    """Chunks, preemptions and prefixes from the cache change nothing: what is read is the same FP8 numbers.

    But for one request at most: a number that is rounded otherwise in a batch of another size may be another of FP8.
    """
    options, prompts = FLOAT32 | {"kv_cache_dtype": "fp8", "enforce_eager": enforce_eager}, mixed_prompts()
    path = checkpoint("qwen3").path
    with engine(path, **options | {"enforce_eager": True}, enable_prefix_caching=False) as llm:
        assert llm.config.kv_cache_dtype == "fp8_e4m3"
        want = tokens(generate(llm, prompts))
    for scenario in SCENARIOS:
        with engine(path, **options, **scenario_options(scenario, 16)) as llm:
            trace = Trace(llm)
            assert num_equal(tokens(generate(llm, prompts)), want) >= len(want) - 1
            assert SCENARIOS[scenario](trace)
            assert num_equal(tokens(generate(llm, prompts)), want) >= len(want) - 1


def num_equal(results: list, others: list) -> int:
    return sum(a == b for a, b in zip(results, others, strict=True))


@pytest.mark.parametrize("scale", [None, 0.05])
@needs_fp8
def test_logits_of_an_fp8_cache(random_qwen3, scale, tmp_path):
    """In bf16, against float32: worse than those of a cache in bf16, but not by much.

    Computed in float32 on a CPU, the FP8 numbers alone make an error of 0.06 in a model like this, whatever the scale.
    """
    folder, model = random_qwen3
    if scale is not None:
        shutil.copytree(folder, tmp_path / "scaled")
        folder = str(tmp_path / "scaled")
        tensors = load_file(f"{folder}/model.safetensors")
        scales = (f"model.layers.{layer}.self_attn.{name}_scale" for layer in range(28) for name in "kv")
        save_file(tensors | {name: torch.tensor(scale) for name in scales}, f"{folder}/model.safetensors")
    prompts = [random_prompt(seed, 200, 151_936) for seed in range(16)]
    logits, generated = engine_logits(folder, prompts, kv_cache_dtype="fp8", num_kvcache_blocks=64)
    ids = torch.cat([torch.tensor(prompts, device="cuda"), generated], dim=1)
    reference = reference_logits(cast(model, torch.float32), ids)
    cast(model, torch.bfloat16)
    plain_error = relative_error(engine_logits(folder, prompts, num_kvcache_blocks=64)[0][0], reference[0])
    for step in (slice(0, 1), slice(1, None)):
        assert plain_error < relative_error(logits[step], reference[step]) < 0.1


@needs_fp8
def test_twice_as_many_blocks_of_fp8_fit(random_qwen3):
    folder, _model = random_qwen3
    nums = []
    for kv_cache_dtype in ("auto", "fp8"):
        options = {"device": "cuda", "gpu_memory_utilization": 0.5, "enforce_eager": True}
        with LLM(folder, kv_cache_dtype=kv_cache_dtype, **options) as llm:
            nums.append(len(llm.scheduler.block_manager.blocks))
    assert 1.95 < nums[1] / nums[0] < 2.05


@pytest.mark.parametrize("backend", ["torch", "flash_attn"])
def test_other_backends_refuse_an_fp8_cache(random_qwen3, monkeypatch, backend):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match=f"kv_cache_dtype='fp8' needs attention_backend='triton', it is '{backend}'"):
        LLM(random_qwen3[0], device="cuda", attention_backend=backend, kv_cache_dtype="fp8")


@pytest.mark.parametrize("backend", ["triton", "torch", "flash_attn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_family(checkpoint, family, backend, tmp_path):
    """In bf16, against float32, as above: of small models, whose experts are chosen alike but for rounding."""
    if backend == "flash_attn":
        pytest.importorskip("flash_attn")
        if read_json(f"{checkpoint(family).path}/config.json").get("head_dim", 16) % 8:
            pytest.skip("flash-attn takes heads of multiples of 8")
    model = copy.deepcopy(checkpoint(family).model)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 0.5  # so that errors do not grow from layer to layer
    cast(model, torch.bfloat16).save_pretrained(tmp_path)
    model.cuda()
    prompts = [random_prompt(seed, 200) for seed in range(32)]
    logits, generated = engine_logits(
        str(tmp_path), prompts, attention_backend=backend, num_kvcache_blocks=64, max_num_batched_tokens=16384
    )
    ids = torch.cat([torch.tensor(prompts, device="cuda"), generated], dim=1)
    theirs = reference_logits(model, ids)
    reference = reference_logits(cast(model, torch.float32), ids)
    error = relative_error(theirs, reference)
    assert 1e-4 < error < 0.1
    assert relative_error(logits, reference) <= 1.2 * error
