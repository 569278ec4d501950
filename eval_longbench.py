"""LongBench with full and quantised KV caches: ``python eval_longbench.py --help``."""

from gsrq_jax.models.commands import longbench

if __name__ == "__main__":
    longbench()
