"""A model and its samples on a mesh: which axis goes where, and that nothing changes by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from flax import nnx
from jax.sharding import PartitionSpec as P

from gsrq_jax.calibration import SampleStore
from gsrq_jax.errors import InputError
from gsrq_jax.models import llama, loading, sharding, training
from gsrq_jax.models.config import LlamaConfig


def test_parameters_by_the_table():
    config = LlamaConfig(
        family="qwen3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        max_length=128,
        qk_norm=True,
        attention_bias=True,
    )
    mesh = sharding.make_mesh(2, (4, 2))
    _, params = llama.abstract(config)
    found = {
        path: leaf.get_value().spec
        for path, leaf in nnx.to_flat_state(sharding.shardings(mesh, params))
    }
    attention, mlp = ("layers", "self_attn"), ("layers", "mlp")
    assert found[*attention, "k_proj", "kernel"] == P(None, "data", "model")
    assert found[*attention, "k_proj", "bias"] == P(None, "model")
    assert found[*attention, "o_proj", "kernel"] == P(None, "model", "data")
    assert found[*attention, "o_proj", "bias"] == P(None, "data")
    assert found[*attention, "q_norm", "scale"] == P(None, None)
    assert found[*mlp, "down_proj", "kernel"] == P(None, "model", "data")
    assert found["embed_tokens", "embedding"] == P("model", "data")
    assert found["lm_head", "kernel"] == P("data", "model")
    assert found["norm", "scale"] == P(None)
    assert len(found) == len(nnx.to_flat_state(params))


def test_what_does_not_divide_is_copied():
    mesh = sharding.make_mesh(2, (4, 2))
    _, params = llama.abstract(small_model.CONFIG)  # of 61 words
    found = sharding.shardings(mesh, params)
    assert found["embed_tokens"]["embedding"].get_value().spec == P(None, "data")


def test_samples_of_a_sharded_model(tiny_model, tmp_path):
    """They are loaded, captured and put in the store as on one device; the last step is short."""

    def shardings(config, params):
        return sharding.shardings(mesh, params)

    mesh = sharding.make_mesh(2, (2, 2))
    model = loading.load(tiny_model, dtype=jnp.float32)
    spread = loading.load(tiny_model, dtype=jnp.float32, shardings=shardings)
    kernel = spread.params["layers"]["self_attn"]["k_proj"]["kernel"].get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)
    tokens = np.random.default_rng(0).integers(2, 258, (3, 16)).astype(np.int32)
    stores = []
    for name, of, on in (("one", model, None), ("many", spread, mesh)):
        store = SampleStore.open(
            tmp_path / name,
            layers=2,
            sequences=3,
            tokens=14,
            heads=2,
            dim=8,
            first=2,
            moments=True,
        )
        training.capture(of, tokens, store, weigh=True, mesh=on)
        assert store.done == 3
        stores.append(store)
    for layer in range(2):
        one, many = (jax.tree.map(np.float32, store.layer(layer)) for store in stores)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-5), one, many)


@pytest.mark.parametrize(
    ("kv_heads", "shape", "together", "words"),
    [
        (2, (4, 4), 1, "a mesh of 4 × 4 does not fit 8 devices"),
        (2, (0, 1), 1, "a mesh of 0 × 1 does not fit 8 devices"),
        (3, (4, 2), 1, "2 devices cannot share 3 KV heads evenly; .* must divide 3"),
        (8, (2, 4), 4, "4 devices cannot share 8 KV heads, of which 4 share codes, evenly; .* 2"),
    ],
)
def test_meshes_that_cannot_be(kv_heads, shape, together, words):
    with pytest.raises(InputError, match=words):
        sharding.make_mesh(kv_heads, shape, together=together)


def test_meshes():
    assert sharding.make_mesh(8) is None  # CPU devices share cores
    assert sharding.make_mesh(8, (1, 1)) is None
    devices = jax.devices()
    for kv_heads, shape in ((8, (1, 8)), (2, (4, 2)), (3, (8, 1)), (6, (4, 2))):
        mesh = sharding.make_mesh(kv_heads, devices=devices)
        assert (mesh.axis_names, mesh.devices.shape) == (("data", "model"), shape)
    assert sharding.make_mesh(8, (3, 2)).size == 6
    assert sharding.make_mesh(8, devices=devices, together=4).devices.shape == (4, 2)
    mesh = sharding.make_mesh(2, (4, 2))
    assert sharding.for_tokens(mesh, 496) is mesh
    assert sharding.for_tokens(mesh, 62).devices.shape == (2, 2)
