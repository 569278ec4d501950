"""What parities of neighbouring signs are worth as further planes, on real keys and values.

    python benchmarks/parities.py --text FILE

A code of two codewords a stage is a sum of vectors with signs. Products of neighbouring signs,
``s_r s_{r-1}`` and so on, can have vectors of their own: a trellis code that needs no more bits.
The encoder decides all planes of a stage at once. Measured is the squared error that is left of
held-out vectors of one head, over their variance. Writes ``results/parities.json``, a row for each
layer, side, number of stages and number of planes a stage.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from reconstruction import PARTS, ROOT, samples
from reconstruction import Config as Samples

from gsrq_jax import joint
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, text
from gsrq_jax.results import command_line, write_result

PLANES = {1: "signs", 2: "and s_r s_{r-1}", 4: "and s_r s_{r-2}, s_r s_{r-1} s_{r-2}"}
EXACT = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Config:
    """Held-out errors of joint codes with one, two and four planes a stage.

    Attributes:
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        text: text file to take keys and values from, or ``python`` for Python's help topics.
        layers: layers, spread over the depth.
        tokens: tokens to learn from, at most.
        held_out: tokens to measure on, at most.
        length: tokens of a sequence.
        stages: numbers of stages.
        planes: planes of a stage, of 1, 2 and 4.
        beam: beginnings that the encoder keeps.
        rounds: of encoding and least squares, after as many of signs alone.
        seed: of the parities' first vectors.
        out: folder under which ``results`` lies.
    """

    model: str = "demo"
    text: str = text.PYTHON_TOPICS
    layers: int = 2
    tokens: int = 8_192
    held_out: int = 4_096
    length: int = 1024
    stages: tuple[int, ...] = (32, 64)
    planes: tuple[int, ...] = (1, 2, 4)
    beam: int = 8
    rounds: int = 12
    seed: int = 0
    out: pathlib.Path = ROOT


def products(signs: tuple[Array, Array, Array], planes: int) -> list[Array]:
    """The planes of a stage, of its own sign and of those one and two stages before."""
    own, before, earlier = signs
    return [own, own * before, own * earlier, own * before * earlier][:planes]


def features(signs: Float[Array, "n R"], planes: int) -> Float[Array, "n R*planes"]:
    """All planes of all stages; signs before the first stage are 0."""
    before, earlier = (jnp.pad(signs, ((0, 0), (k, 0)))[:, :-k] for k in (1, 2))
    found = products((signs, before, earlier), planes)
    return jnp.stack(found, axis=2).reshape(len(signs), -1)


@functools.partial(jax.jit, static_argnames=("planes", "beam"))
def encode(
    x: Float[Array, "n d"],
    offset: Float[Array, " d"],
    vectors: Float[Array, "F d"],
    noise: Float[Array, ""],
    *,
    planes: int,
    beam: int,
) -> Float[Array, "n R"]:
    """Signs by the M-algorithm, as `gsrq_jax.joint.encode` finds them where there is one plane."""
    count, n = len(vectors), len(x)
    back = vectors[::-1]
    gram = jnp.matmul(back, back.T, precision=EXACT) + noise * jnp.eye(count)
    factor = lax.linalg.cholesky(gram)
    target = jnp.matmul(back, (x - offset).T, precision=EXACT)
    target = lax.linalg.triangular_solve(factor, target, left_side=True, lower=True)[::-1]
    lower = factor.T[::-1, ::-1]

    def stage(state: tuple[Array, ...], first: Array) -> tuple[tuple[Array, ...], Array]:
        error, found, before, earlier = state
        rows = lax.dynamic_slice_in_dim(lower, first, planes)
        square = lax.dynamic_slice_in_dim(rows, first, planes, axis=1)
        left = lax.dynamic_slice_in_dim(target, first, planes)
        left = left - jnp.einsum("kf,mfn->mkn", rows, found, precision=EXACT)
        errors = []
        for sign in (1.0, -1.0):
            new = products((jnp.full_like(before, sign), before, earlier), planes)
            moved = jnp.einsum("kj,mjn->mkn", square, jnp.stack(new, axis=1), precision=EXACT)
            errors.append(error + jnp.sum(jnp.square(left - moved), axis=1))
        negative, best = lax.top_k(-jnp.concatenate(errors).T, beam)
        parent, sign = best.T % beam, jnp.where(best.T // beam == 0, 1.0, -1.0)
        found = jnp.take_along_axis(found, parent[:, None], axis=0)
        before, earlier = (jnp.take_along_axis(s, parent, axis=0) for s in (before, earlier))
        new = jnp.stack(products((sign, before, earlier), planes), axis=1)
        found = lax.dynamic_update_slice_in_dim(found, new, first, axis=1)
        return (-negative.T, found, sign, before), first

    none = jnp.zeros((beam, n))
    error = none.at[1:].set(jnp.inf)
    start = error, jnp.zeros((beam, count, n)), none, none
    (_, found, *_), _ = lax.scan(stage, start, jnp.arange(0, count, planes))
    return found[0, ::planes].T


@jax.jit
def least_squares(
    x: Float[Array, "n d"], features: Float[Array, "n F"]
) -> tuple[Float[Array, " d"], Float[Array, "F d"]]:
    """Offset and vectors of the least squared error."""
    both = jnp.concatenate([features, jnp.ones((len(x), 1))], axis=1)
    gram = jnp.matmul(both.T, both, precision=EXACT)
    gram = gram + 1e-4 * jnp.mean(jnp.diagonal(gram)) * jnp.eye(len(gram))
    found = jnp.linalg.solve(gram, jnp.matmul(both.T, x, precision=EXACT))
    return found[-1], found[:-1]


def left_over(config: Config, x: Array, held_out: Array, stages: int, planes: int) -> float:
    """Squared error of held-out vectors over their variance, after a fit to others."""
    weights = jnp.ones(len(x))
    words, _ = joint.fit(x, weights, stages, rounds=config.rounds, beam=config.beam)
    offset, vectors = joint.signed(words)
    rng = np.random.default_rng(config.seed)
    length = 0.25 * jnp.linalg.norm(vectors, axis=1)[:, None, None]
    spread = jnp.std(x, axis=0)
    random = rng.normal(size=(stages, planes - 1, x.shape[1])) * spread
    random = length * random / np.linalg.norm(spread)
    vectors = jnp.concatenate([vectors[:, None], jnp.asarray(random, jnp.float32)], axis=1)
    vectors = vectors.reshape(stages * planes, -1)
    how: dict[str, int] = {"planes": planes, "beam": config.beam}
    noise = jnp.mean(jnp.var(x, axis=0)) / 4
    for _ in range(config.rounds):
        found = features(encode(x, offset, vectors, noise, **how), planes)
        offset, vectors = least_squares(x, found)
        noise = jnp.mean(jnp.square(x - offset - found @ vectors))
    found = features(encode(held_out, offset, vectors, noise, **how), planes)
    wrong = jnp.sum(jnp.square(held_out - offset - found @ vectors))
    return float(wrong / jnp.sum(jnp.square(held_out - held_out.mean(axis=0))))


def main(config: Config) -> None:
    """Measure all and write the result.

    Raises:
        InputError: if the text or the model is too small, or a number of planes is not known.
    """
    if not set(config.planes) <= set(PLANES):
        raise InputError(f"--planes takes {', '.join(map(str, PLANES))}, got {config.planes}")
    names = ("model", "text", "layers", "tokens", "held_out", "length")
    given: dict[str, Any] = {name: getattr(config, name) for name in names}
    learned, held = samples(Samples(**given, dims=(), codewords=(max(config.stages),)))
    rows = []
    for part in PARTS:
        for layer in range(config.layers):
            x, out = (jnp.asarray(y[part][layer, :, 0]) for y in (learned, held))
            for stages in config.stages:
                for planes in config.planes:
                    left = left_over(config, x, out, stages, planes)
                    row = {"part": part, "layer": layer, "bits": stages / x.shape[1]}
                    rows.append(row | {"planes": planes, "left": left, "points": len(x)})
                    print(rows[-1], flush=True)
    path = config.out / "results" / "parities.json"
    write_result(path, rows, command=command_line(), **given | {"planes": PLANES})


if __name__ == "__main__":
    commands.run(Config, main, None)
