"""Regular expressions as rules of a grammar, and those of the formats that JSON schemas name.

A room that knows nothing of models, requests or tokens; structured/ asks `regex_rules` for what a text must match.
"""
