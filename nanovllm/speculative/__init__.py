"""Speculation: a step checks drafts of a row's next tokens, and keeps those that the model would have drawn anyway.

Rejection sampling (Leviathan et al., arXiv 2211.17192) of a draft that is proposed for certain is this: a token is
drawn as ever; if it is the draft, the draft is accepted, and what was computed behind it counts too; if not, it is
itself distributed as the draft's replacement must be. A draw depends on a request's seed and the position alone. So
tokens are the same with speculation and without, greedy or drawn, up to the rounding of products with other numbers of
rows.

`params` has the options, `policy` says on the host when checking pays, by each sequence's `record`, and `draft_rows`
is what the device has of it. What proposes drafts is one function there, a look-up in the text itself
(kernels/ngrams.py); a draft model could take its place. Knows nothing of models, requests or graphs.
"""
