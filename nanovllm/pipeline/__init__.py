"""Pipeline parallelism: the layers are shared out among stages, each on GPUs of its own, which a step passes in turn.

Between two stages only the hidden states of a step's tokens travel, once, where tensor parallelism sums them up twice
in every layer: so this is for GPUs without a fast link. While one stage computes a step, the others compute the steps
before it, of other sequences (GPipe, arXiv 1811.06965, has such microbatches). A stage may itself be several
tensor-parallel ranks. Nothing here knows what the layers compute, or how a step is chosen.
"""
