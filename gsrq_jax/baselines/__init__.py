"""The methods that GSRQ is compared with, each one a spec, a `gsrq_jax.codec.Codec` and a `fit`.

A module's docstring says what it reproduces, which choices were made and where it differs.
"""
