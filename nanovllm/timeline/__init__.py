"""Pictures of a run that `nanovllm.trace` recorded; nothing here needs an engine, or torch."""
