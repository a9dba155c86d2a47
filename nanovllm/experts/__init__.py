"""Mixtures of experts: which layers of a model have one, and what is computed in place of their MLPs.

`mixture` reads the facts of a checkpoint, `layers` has the modules, which families in models/ put where an MLP would
be. How experts' products are computed, kernels/experts.py says. Without this folder there would be dense models only.
"""
