"""The example of docs/own-model.md runs, and its page quotes it."""

import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np

from gsrq_jax import causal, init_cache

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_page_quotes_the_example():
    code = (DOCS / "own_model.py").read_text(encoding="utf-8")
    page = (DOCS / "own-model.md").read_text(encoding="utf-8")
    quoted = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(quoted) > 4
    for part in quoted:
        assert part in code


def test_the_example_runs(tmp_path, capsys):
    example = runpy.run_path(str(DOCS / "own_model.py"))
    batch, prompt, new = 2, 24, 9
    params, books, losses, written, cache = example["main"](tmp_path, batch, prompt, new)
    assert losses[-1] < 0.9 * losses[0]
    assert books.key.dtype == jnp.bfloat16
    assert cache.length.tolist() == [[prompt + new] * batch] * 2
    assert written.shape == (new, batch)
    assert str(books.spec) in capsys.readouterr().out

    # Its loop over an exact cache writes what the model alone would write.
    tokens = jax.random.randint(jax.random.key(1), (batch, prompt), 0, example["VOCAB"])
    cache = init_cache(
        None, batch=batch, kv_heads=2, head_dim=8, layers=2, max_length=64, dtype=jnp.float32
    )
    logits, cache = example["prefill"](params, tokens, cache, None)
    written, _ = example["decode"](params, logits, cache, None, new)
    whole = jnp.concatenate([tokens, written.T], axis=1)
    positions = jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)
    logits, _ = jax.jit(
        lambda: example["model"](
            params, whole, positions, lambda q, k, v, _: (causal(q, k, v), None)
        )
    )()
    np.testing.assert_array_equal(jnp.argmax(logits[:, prompt - 1 : -1], -1), written.T)
