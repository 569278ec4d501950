"""The encoding kernel in TPU interpret mode against the encoder, and compiled without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gsrq_jax import residual
from gsrq_jax.kernels import mosaic_tpu_encode
from gsrq_jax.kernels.errors import InputError


def make(lead, n, groups, stages, k, group, seed=0):
    """Vectors, and codewords that get smaller from stage to stage."""
    rng = np.random.default_rng(seed)
    size = 0.7 ** np.arange(stages)[:, None, None]
    codewords = size * rng.normal(size=(*lead, groups, stages, k, group))
    x = rng.normal(size=(*lead, n, groups * group))
    return x.astype(np.float32), codewords.astype(np.float32)


def encode(x, codewords):
    return mosaic_tpu_encode.encode(x, codewords, tokens=128, interpret=True)


@pytest.mark.parametrize(
    ("lead", "n", "groups", "stages", "k", "group"),
    [
        ((2,), 300, 1, 4, 16, 24),  # two steps and a part of a third
        ((), 77, 2, 3, 5, 6),  # no lead, less than a step, sizes that fill no register
        ((1, 2), 130, 1, 2, 256, 16),
        ((1,), 1, 1, 1, 2, 8),
    ],
)
def test_is_the_encoder(lead, n, groups, stages, k, group):
    x, codewords = make(lead, n, groups, stages, k, group)
    got = encode(x, codewords)
    assert got.dtype == jnp.uint8
    np.testing.assert_array_equal(got, residual.encode(x, codewords))


def test_what_follows_does_not_matter():
    """Vectors of NaN share a step with others, and so does what lies beyond the last, NaN too."""
    x, codewords = make((2,), 200, 1, 3, 16, 16, seed=1)
    poisoned = x.copy()
    poisoned[:, 150:] = np.nan
    got, want = encode(poisoned, codewords), encode(x, codewords)
    np.testing.assert_array_equal(got[:, :150], want[:, :150])


def test_equal_codewords_are_decided_for_the_lower():
    x, codewords = make((1,), 40, 1, 2, 8, 8, seed=2)
    codewords[..., 5, :] = codewords[..., 3, :]
    got = encode(x, codewords)
    np.testing.assert_array_equal(got, residual.encode(x, codewords))
    assert (np.asarray(got) == 3).any()
    assert not (np.asarray(got) == 5).any()


def test_bfloat16_vectors():
    x, codewords = make((1,), 50, 1, 2, 16, 8, seed=3)
    x = jnp.asarray(x, jnp.bfloat16)
    np.testing.assert_array_equal(encode(x, codewords), residual.encode(x, codewords))


def test_says_what_it_does_not_have():
    with pytest.raises(InputError, match="at most 256 codewords, got 512"):
        encode(*make((1,), 4, 1, 1, 512, 8))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPU's compiler, is not installed"
)
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(("stages", "k"), [(32, 16), (16, 256)])
def test_compiles_for_tpus(chip, stages, k):
    """LLaMA-3-8B's keys at 1 bit, of a number that fills no step."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    heads, n, d = 8, 100_100, 128

    def of(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=SingleDeviceSharding(device))

    compiled = mosaic_tpu_encode.encode.lower(of(heads, n, d), of(heads, 1, stages, k, d)).compile()
    assert "tpu_custom_call" in compiled.as_text()
    # The vectors in another order, codes, and words in pieces: no scores, no residuals.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * heads * n * d * 4
