"""Learn the codebooks of a model's quantised KV cache: ``python train_codebooks.py --help``."""

from gsrq_jax.models.commands import train

if __name__ == "__main__":
    train()
