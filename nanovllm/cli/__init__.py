"""The command line: `nanovllm COMMAND`. A command is a module with `add_arguments(parser)` and `run(args)`."""
