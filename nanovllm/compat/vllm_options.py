"""Options of vLLM, of its versions 0.6 to 0.16, that ask for what is not here: a table, and nothing else.

Values that do not ask for it are passed over, every other one is refused with the reason, so that nothing that would
change what an engine does is ignored. What is passed over whatever it says, or asks for speed alone, says so.
"""

from typing import Any


def is_size(value: object) -> bool:
    """Whether a value is a number that can be a size in GiB."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def has_only_zeros(value: object) -> bool:
    """Whether a value is a dict of numbers that are all 0."""
    return isinstance(value, dict) and all(number == 0 for number in value.values())


Accepted = tuple[Any, ...]  # values, types of values, and functions that tell whether a value is accepted
ANYTHING: Accepted = (object,)
FLAG: Accepted = (bool, None)
NONE: Accepted = (None,)
OFF: Accepted = (False, None)
EMPTY: Accepted = (None, "", {}, [], ())
NUMBER: Accepted = (int, float, None)

# By the reason why other values are refused: options, each with the values that ask for nothing.
NOT_HERE: dict[str, dict[str, Accepted]] = {
    # What the model is, and how its files are read.
    "only text is generated, there are no embeddings, classes, scores or transcriptions": {
        "task": (None, "auto", "generate"),
        "runner": (None, "auto", "generate"),
        "convert": (None, "auto", "none"),
        "pooler_config": NONE,
        "override_pooler_config": NONE,
    },
    "no code of a checkpoint is ever run, and no supported model needs any; leave it out": {
        "trust_remote_code": OFF,
        "code_revision": NONE,
    },
    "models are run by this package's own layers": {"model_impl": (None, "auto", "vllm")},
    "config.json is read in Hugging Face's form, the model's or that of hf_config_path; hf_overrides changes keys": {
        "config_format": (None, "auto", "hf")
    },
    "pass it by hf_overrides, as a key of config.json": {"rope_scaling": EMPTY, "rope_theta": NONE},
    "plain weights are rounded as the option quantization says, and config.json says how quantised ones are stored": {
        "quantization_config": EMPTY
    },
    "scales are read from the checkpoint, from no file of their own": {"quantization_param_path": NONE},
    "attention computes in the dtype of the model": {"override_attention_dtype": NONE},
    "the KV cache has one dtype, kv_cache_dtype, and in FP8 the scales of the checkpoint": {
        "kv_cache_dtype_skip_layers": EMPTY,
        "calculate_kv_scales": OFF,
    },
    "only safetensors and GGUF files are read, by this package's own loader": {
        "model_loader_extra_config": EMPTY,
        "safetensors_load_strategy": (None, str),
        "pt_load_map_location": ANYTHING,
    },
    "what is downloaded are JSON files, tokenizers, chat templates and safetensors": {
        "ignore_patterns": (*EMPTY, "original/**/*", ["original/**/*"])
    },
    "no progress of loading is shown": {"use_tqdm_on_load": FLAG},
    "an engine shows no name; the server has an option of that name": {"served_model_name": (None, str, list)},
    # Text.
    "text is tokenised by the tokenizers package alone, from tokenizer.json or what converts to it": {
        "tokenizer_mode": (None, "auto", "hf")
    },
    "text is tokenised in the thread of the caller": {
        "tokenizer_pool_size": (None, 0),
        "tokenizer_pool_type": ANYTHING,
        "tokenizer_pool_extra_config": EMPTY,
        "renderer_num_workers": (None, 1),
    },
    "texts are returned whole, there is no parser of reasoning": {
        "reasoning_parser": (None, ""),
        "reasoning_parser_plugin": (None, ""),
        "reasoning_config": EMPTY,
    },
    "write the values to generation_config.json of a folder, and pass that as generation_config": {
        "override_generation_config": EMPTY
    },
    # Prompts of other kinds.
    "prompts are text or token ids, not embeddings": {"enable_prompt_embeds": OFF},
    "prompts are text or token ids, there are no images, sounds or videos": {
        "limit_mm_per_prompt": (*EMPTY, has_only_zeros),
        "allowed_local_media_path": EMPTY,
        "allowed_media_domains": EMPTY,
        "media_io_kwargs": EMPTY,
        "mm_processor_kwargs": EMPTY,
        "mm_processor_cache_gb": NUMBER,
        "mm_processor_cache_type": ANYTHING,
        "mm_shm_cache_max_object_size_mb": NUMBER,
        "mm_encoder_only": OFF,
        "mm_encoder_tp_mode": ANYTHING,
        "mm_encoder_attn_backend": NONE,
        "mm_tensor_ipc": ANYTHING,
        "enable_mm_embeds": OFF,
        "enable_multimodal_encoder_data_parallel": OFF,
        "interleave_mm_strings": OFF,
        "video_pruning_rate": (None, 0, 0.0),
        "disable_mm_preprocessor_cache": FLAG,
        "disable_chunked_mm_input": FLAG,
        "language_model_only": FLAG,
        "skip_mm_profiling": FLAG,
        "io_processor_plugin": NONE,
    },
    # Adapters.
    "there are no LoRA adapters": {
        "enable_lora": OFF,
        "enable_lora_bias": OFF,
        "enable_tower_connector_lora": OFF,
        "fully_sharded_loras": OFF,
        "default_mm_loras": EMPTY,
        "long_lora_scaling_factors": EMPTY,
        "qlora_adapter_name_or_path": NONE,
        # These say something only of adapters that are enabled.
        "max_loras": NUMBER,
        "max_lora_rank": NUMBER,
        "max_cpu_loras": NUMBER,
        "lora_dtype": ANYTHING,
        "lora_extra_vocab_size": NUMBER,
        "lora_target_modules": ANYTHING,
        "specialize_active_lora": FLAG,
    },
    "there are no prompt adapters": {
        "enable_prompt_adapter": OFF,
        "max_prompt_adapters": NUMBER,
        "max_prompt_adapter_token": NUMBER,
    },
    # Several devices.
    "a model is split over GPUs by tensor_parallel_size and pipeline_parallel_size": {
        "prefill_context_parallel_size": (None, 1),
        "decode_context_parallel_size": (None, 1),
        "dcp_kv_cache_interleave_size": NUMBER,
        "cp_kv_cache_interleave_size": NUMBER,
        "dcp_comm_backend": ANYTHING,
    },
    "an engine is one replica; start an engine for each": {
        "data_parallel_size": (None, 1),
        "data_parallel_size_local": (None, 0, 1),
        "data_parallel_rank": (None, 0),
        "data_parallel_start_rank": (None, 0),
        "data_parallel_address": NONE,
        "data_parallel_rpc_port": NUMBER,
        "data_parallel_backend": (None, "mp"),
        "data_parallel_hybrid_lb": OFF,
        "data_parallel_external_lb": OFF,
        "disable_nccl_for_dp_synchronization": FLAG,
    },
    "experts are split by tensor_parallel_size alone, a share of each to every rank": {
        "enable_expert_parallel": OFF,
        "enable_eplb": OFF,
        "enable_dbo": OFF,
        "enable_return_routed_experts": OFF,
        "eplb_config": EMPTY,
        "eplb_window_size": NUMBER,
        "eplb_step_interval": NUMBER,
        "eplb_log_balancedness": FLAG,
        "num_redundant_experts": (None, 0),
        "expert_placement_strategy": (None, "linear"),
        "all2all_backend": ANYTHING,
        "moe_backend": ANYTHING,
        "ubatch_size": (None, 0),
        "dbo_decode_token_threshold": NUMBER,
        "dbo_prefill_token_threshold": NUMBER,
    },
    "ranks are this package's own processes, all on one host": {
        "distributed_executor_backend": (None, "mp"),
        "worker_use_ray": OFF,
        "engine_use_ray": OFF,
        "ray_workers_use_nsight": OFF,
        "nnodes": (None, 1),
        "node_rank": (None, 0),
        "master_addr": ANYTHING,
        "master_port": NUMBER,
        "worker_cls": (None, "auto"),
        "worker_extension_cls": (None, ""),
        "distributed_timeout_seconds": NONE,
    },
    "all ranks load at once, each no more than its own part": {"max_parallel_loading_workers": NONE},
    "ranks are summed over peer memory where the GPUs reach each other's, and by NCCL where not": {
        "disable_custom_all_reduce": FLAG
    },
    # Memory.
    "a size in GiB of at least 0 is expected; none is used, as preempted requests are computed again": {
        "swap_space": (None, is_size)
    },
    "preempted requests are computed again": {"preemption_mode": (None, "recompute")},
    "weights and KV cache stay on their device": {
        "cpu_offload_gb": (None, 0, 0.0),
        "cpu_offload_params": EMPTY,
        "kv_offloading_size": (None, 0, 0.0),
        "kv_offloading_backend": (None, str),  # of a size that is not given
        "enable_sleep_mode": OFF,
    },
    "the KV cache is sized by gpu_memory_utilization or num_kvcache_blocks": {"kv_cache_memory_bytes": NONE},
    "the KV cache and the weights are not handed to or taken from others": {
        "kv_transfer_config": NONE,
        "kv_events_config": NONE,
        "ec_transfer_config": NONE,
        "weight_transfer_config": NONE,
    },
    "each layer has a KV cache of its own": {"kv_sharing_fast_prefill": OFF},
    "prefixes are found by xxhash and confirmed by their tokens": {"prefix_caching_hash_algo": (None, str)},
    "the KV cache has one kind of blocks, and one manager of them": {
        "disable_hybrid_kv_cache_manager": FLAG,
        "use_v2_block_manager": FLAG,
    },
    "layers have the windows that config.json gives them; max_model_len may keep texts within": {
        "disable_sliding_window": OFF
    },
    "no attention backend cascades": {"disable_cascade_attn": FLAG},
    "no supported model has Mamba layers": {
        "mamba_cache_dtype": (None, "auto"),
        "mamba_ssm_cache_dtype": (None, "auto"),
        "mamba_block_size": NONE,
        "mamba_cache_mode": (None, "none"),
    },
    # Steps.
    "a prompt that does not fit into a step is always computed in chunks": {"enable_chunked_prefill": (None, True)},
    "prompts are computed in the order in which they came, at most the last of a step in part": {
        "scheduler_cls": NONE,
        "scheduler_delay_factor": (None, 0, 0.0),
        "max_num_partial_prefills": (None, 1),
        "max_long_partial_prefills": (None, 1),
    },
    "a step is bounded by max_num_batched_tokens": {"max_num_scheduled_tokens": NONE},
    "a request is admitted when its prompt has blocks, and preempted if they run out": {
        "scheduler_reserve_full_isl": FLAG
    },
    "each step draws one token of each request, and streams yield each piece of text at once": {
        "num_scheduler_steps": (None, 1),
        "num_lookahead_slots": (None, 0),
        "multi_step_stream_outputs": FLAG,
        "stream_interval": (None, 1),
    },
    "results are prepared while the next step runs; async_scheduling=False says otherwise": {
        "disable_async_output_proc": FLAG
    },
    "drafts are those of speculative_config, looked up in the text or by a smaller model": {
        "spec_method": NONE,
        "spec_model": NONE,
        "spec_tokens": NONE,
        "speculative_model": NONE,
        "speculative_model_quantization": NONE,
        "speculative_draft_tensor_parallel_size": NONE,
        "speculative_max_model_len": NONE,
        "speculative_disable_by_batch_size": NONE,
        "speculative_disable_mqa_scorer": OFF,
        "num_speculative_tokens": NONE,
        "ngram_prompt_lookup_max": NONE,
        "ngram_prompt_lookup_min": NONE,
        "spec_decoding_acceptance_method": ANYTHING,
        "typical_acceptance_sampler_posterior_threshold": NUMBER,
        "typical_acceptance_sampler_posterior_alpha": NUMBER,
        "disable_logprobs_during_spec_decoding": FLAG,
    },
    "CUDA graphs serve sequences of any length": {
        "max_seq_len_to_capture": NUMBER,
        "max_context_len_to_capture": NUMBER,
    },
    "the batch sizes of CUDA graphs follow from max_num_seqs; enforce_eager=True runs without graphs": {
        "cuda_graph_sizes": EMPTY,
        "cudagraph_capture_sizes": EMPTY,
        "max_cudagraph_capture_size": NONE,
    },
    "the kernels are this package's own, chosen by attention_backend, sampler_backend and enforce_eager": {
        "compilation_config": (None, {}, 0),
        "optimization_level": (None, int),  # of speed alone
        "performance_mode": (None, str),  # of speed alone
        "attention_config": EMPTY,
        "kernel_config": EMPTY,
        "linear_backend": (None, "auto"),
    },
    # What is drawn and returned.
    "logprobs are those of the model's own logits": {"logprobs_mode": (None, "raw_logprobs")},
    "Python functions of each step's logits would leave the CUDA graphs; SamplingParams say what can be asked for": {
        "logits_processors": EMPTY,
        "logits_processor_pattern": NONE,
    },
    "structured outputs are made by xgrammar": {
        "guided_decoding_backend": (None, "auto", "xgrammar"),
        "guided_decoding_disable_fallback": FLAG,
        "structured_outputs_config": (*EMPTY, {"backend": "auto"}, {"backend": "xgrammar"}),
    },
    "StructuredOutputsParams says it for a request": {
        "guided_decoding_disable_any_whitespace": OFF,
        "guided_decoding_disable_additional_properties": OFF,
    },
    # What is logged.
    "neither statistics nor requests are logged": {
        "disable_log_stats": FLAG,
        "disable_log_requests": FLAG,
        "enable_log_requests": OFF,
        "aggregate_engine_logging": OFF,
        "enable_logging_iteration_details": OFF,
    },
    "no metrics, traces or profiles are exported": {
        "show_hidden_metrics_for_version": NONE,
        "otlp_traces_endpoint": NONE,
        "collect_detailed_traces": EMPTY,
        "kv_cache_metrics": OFF,
        "kv_cache_metrics_sample": NUMBER,
        "cudagraph_metrics": OFF,
        "enable_mfu_metrics": OFF,
        "enable_layerwise_nvtx_tracing": OFF,
        "profiler_config": EMPTY,
    },
    "there are no plugins or other platforms that would read it": {
        "additional_config": EMPTY,
        "override_neuron_config": EMPTY,
        "fail_on_environ_validation": OFF,
    },
}
ACCEPTED = {name: (values, reason) for reason, options in NOT_HERE.items() for name, values in options.items()}
