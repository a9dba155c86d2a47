"""How layers come by their weights, before anything is computed.

`parts` says which rows and columns a rank has, `schemes` how a weight may be stored: the plain way, or one of those of
quantization/. `linear_base` gives a linear layer its parameters, and `load` has all of a model's made, filled from a
checkpoint, and brought to the form that the kernels take.
"""
