"""The composition example of the README runs as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from gsrq_jax import Codebooks, QuantSpec, codebook


def test_the_example_runs(tmp_path, monkeypatch):
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    spec, heads, dim = QuantSpec.from_bits(0.25, 64), 8, 64
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    books = Codebooks(
        key=normal(2, heads, *spec.key.codebook_shape),
        value=normal(2, heads, *spec.value.codebook_shape),
        key_mean=normal(2, heads, dim),
        inv_freq=jnp.ones((2, dim // 2)),
        spec=spec,
    )
    model = {"layers": 2, "kv_heads": heads, "head_dim": dim}
    codebook.save(tmp_path / "runs/llama-1bit/codebooks", books, model=model)
    monkeypatch.chdir(tmp_path)
    names = {
        "k_prompt": normal(1, 300, heads, dim),
        "v_prompt": normal(1, 300, heads, dim),
        "q": normal(1, 1, 4 * heads, dim),
        "k": normal(1, 1, heads, dim),
        "v": normal(1, 1, heads, dim),
    }
    exec(example, names)
    assert names["cache"].length.tolist() == [301]
    assert names["out"].shape == (1, 1, 4 * heads, dim)
    assert bool(jnp.isfinite(names["out"]).all())
    assert jax.tree.structure(names["layer"]) == jax.tree.structure(books)
