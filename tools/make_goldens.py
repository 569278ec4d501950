"""Write the logits that transformers computes for small random models of each family.

Run where torch and transformers are installed, from the root of the checkout:

    python tools/make_goldens.py

It writes ``tests/models/goldens/<model>.npz``, token ids, float32 logits and rotary frequencies,
and ``<model>.json``, the config as transformers writes it. Weights are not stored; they come from
``tests/models/random_weights.py``, here and in the tests. The files in the repository were made
with torch 2.13.0 and transformers 5.24.0 on a CPU, eager attention.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

TESTS = Path(__file__).parents[1] / "tests" / "models"
sys.path.insert(0, str(TESTS))

import random_weights  # noqa: E402


def golden(data: dict) -> tuple[dict[str, np.ndarray], str]:
    """Tokens, logits and rotary frequencies of the model with that config; its config.json."""
    config_class = type(transformers.AutoConfig.for_model(data["model_type"]))
    config = config_class.from_dict(data, attn_implementation="eager")
    model = getattr(transformers, data["architectures"][0])(config).eval()
    weights = {k: torch.from_numpy(v) for k, v in random_weights.tensors(data).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if data["tie_word_embeddings"] else []
    if missing != tied or unexpected:
        raise SystemExit(f"the generator does not fit transformers: {missing}, {unexpected}")
    model.tie_weights()
    tokens = random_weights.tokens(data)
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens.astype(np.int64))).logits
    return {
        "tokens": tokens,
        "logits": logits.float().numpy(),
        "inv_freq": model.model.rotary_emb.inv_freq.numpy(),
    }, config.to_json_string()


def main() -> None:
    """Write every golden and print what to see whether it is a good one."""
    for name, data in random_weights.CONFIGS.items():
        arrays, config_json = golden(data)
        np.savez_compressed(TESTS / "goldens" / f"{name}.npz", **arrays)
        (TESTS / "goldens" / f"{name}.json").write_text(config_json, encoding="utf-8")
        x = arrays["logits"]
        print(f"{name}: logits {x.shape}, std {x.std():.2f}, max {np.abs(x).max():.2f}")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    main()
