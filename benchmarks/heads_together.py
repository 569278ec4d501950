"""What KV heads have in common: one code for all heads of a layer beside a code for each.

    python benchmarks/heads_together.py --model demo --text FILE

Codebooks of as many bits are fitted to real keys and values in both ways, and the squared error of
their codes, over the energy of what is coded, is measured in-sample and on sequences that were held
out. Writes `results/heads-together.json` and from it `docs/heads-together.md`; ``--render`` writes
only the document again.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from gsrq_jax import calibration
from gsrq_jax.calibration import FitOptions
from gsrq_jax.errors import InputError
from gsrq_jax.frame import to_frame
from gsrq_jax.models import commands, loading, text, training
from gsrq_jax.results import write_result
from gsrq_jax.spec import QuantSpec

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        model: folder, .gguf file, hub id, or ``demo``.
        text: text file, or ``python``.
        sequences: to fit codebooks to.
        held_out: to measure on beside those.
        length: tokens of each.
        layers: which ones.
        bits: nominal bits a number, each rate a fit.
        codewords: of a stage.
        out: folder under which ``results`` and ``docs`` lie.
        render: only write the document again.
    """

    model: str = "demo"
    text: str = text.PYTHON_TOPICS
    sequences: int = 20
    held_out: int = 4
    length: int = 1024
    layers: tuple[int, ...] = (3, 15, 27)
    bits: tuple[float, ...] = (1.0, 0.5)
    codewords: int = 256
    out: pathlib.Path = ROOT
    render: bool = False


def run(config: Config) -> Iterator[dict[str, Any]]:
    """One row a layer, side, rate and way."""
    model = loading.load(config.model, dtype="float32")
    heads, layers = model.config.kv_heads, model.config.layers
    if heads < 2:
        raise InputError(f"{model.name} has one KV head a layer, which has no others to go with")
    if not config.layers or max(config.layers) >= layers or min(config.layers) < 0:
        raise InputError(f"--layers must be from 0 to {layers - 1}, got {config.layers}")
    count = config.sequences + config.held_out
    rows = text.sequences(
        text.read(config.text),
        model.needed_tokenizer(),
        length=config.length,
        count=count,
        name=config.text,
    )
    if min(config.sequences, config.held_out) < 1 or len(rows) < count:
        raise InputError(
            f"the text {config.text!r} gives {len(rows)} sequences of {config.length} tokens, not "
            f"{config.sequences} and {config.held_out}, at least one each; give more text or "
            "smaller numbers"
        )
    first = QuantSpec.from_bits(1, model.config.head_dim).sinks
    keys, values = [], []
    for row in tqdm(rows, desc="capture", unit="seq"):
        k, v, *_ = training.key_value_samples(
            model.config,
            model.graphdef,
            model.params,
            jnp.asarray(row)[None],
            first=first,
            weigh=False,
        )
        keys.append(np.asarray(k)[list(config.layers), 0])
        values.append(np.asarray(v)[list(config.layers), 0])
    all_keys, all_values = np.stack(keys, 1), np.stack(values, 1)  # [layers, rows, n, H, d]
    at = jnp.tile(first + jnp.arange(all_keys.shape[2]), config.sequences)
    for index, layer in enumerate(tqdm(config.layers, desc="fit", unit="layer")):
        for bits in config.bits:
            for together in (1, heads):
                spec = QuantSpec.from_bits(
                    bits, model.config.head_dim, codewords=config.codewords, heads=together
                )
                found = measured(
                    all_keys[index], all_values[index], at, model.config.inv_freq, spec, config
                )
                for side, numbers in found.items():
                    yield {
                        "layer": layer,
                        "side": side,
                        "bits": bits,
                        "heads": together,
                        "stages": spec.key.stages,
                    } | numbers


def measured(
    k: Float[np.ndarray, "rows n H d"],
    v: Float[np.ndarray, "rows n H d"],
    at: Int[Array, " N"],
    inv_freq: Float[np.ndarray, " half"],
    spec: QuantSpec,
    config: Config,
) -> dict[str, dict[str, float]]:
    """Relative errors by side, of one layer's codebooks."""
    split, frequencies = config.sequences, jnp.asarray(inv_freq, jnp.float32)

    def flat(x: np.ndarray) -> Array:
        return jnp.asarray(x.reshape(-1, *x.shape[2:]))

    @jax.jit
    def fit(k: Array, v: Array) -> Any:
        return calibration.fit_layer(
            jax.random.key(0), k, v, at, frequencies, spec, options=FitOptions()
        )[0]

    @jax.jit
    def sums(books: Any, k: Array, v: Array, at: Array) -> Array:
        old_k, old_v = books.decode(*books.encode(k, v, at), at)
        centred = to_frame(k, at, spec, books.key_mean, frequencies)
        wrong = jnp.stack([jnp.sum((k - old_k) ** 2), jnp.sum((v - old_v) ** 2)])
        return wrong / jnp.stack([jnp.sum(centred**2), jnp.sum(v.astype(jnp.float32) ** 2)])

    books = fit(flat(k[:split]), flat(v[:split]))
    inside = np.asarray(sums(books, flat(k[:split]), flat(v[:split]), at))
    fresh = jnp.tile(at[: k.shape[1]], config.held_out)
    outside = np.asarray(sums(books, flat(k[split:]), flat(v[split:]), fresh))
    return {
        side: {"in_sample": float(inside[i]), "held_out": float(outside[i])}
        for i, side in enumerate(("keys", "values"))
    }


def markdown(data: Mapping[str, Any]) -> str:
    """The document."""
    rows = data["rows"]
    heads = max(row["heads"] for row in rows)
    lines = [
        "# Heads together",
        "",
        f"`{data['command']}` on {data['device']}, jax {data['versions']['jax']}, "
        f"{data['date'][:10]}: {data['model']}, {heads} KV heads a layer, codebooks fitted to "
        f"{data['tokens']:,} tokens. Squared error over the energy of what is coded (keys less "
        "their mean). Written from `results/heads-together.json`.",
        "",
        "A code for each head, or one of as many bits for all heads of a layer "
        f"(`--heads {heads}`): {heads} times the stages, each codeword {heads} times as long.",
        "",
        "| layer | | bits | each head, held out (in-sample) | together | error together / each |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    cells = {(r["layer"], r["side"], r["bits"], r["heads"]): r for r in rows}
    ratios = []
    for layer, side, bits, together in cells:
        if together != 1:
            continue
        one, all_ = cells[layer, side, bits, 1], cells[layer, side, bits, heads]
        ratio = all_["held_out"] / one["held_out"]
        ratios.append(ratio)
        shown = (f"{r['held_out']:.3f} ({r['in_sample']:.3f})" for r in (one, all_))
        lines.append(f"| {layer} | {side} | {bits:g} | {' | '.join(shown)} | {ratio:.2f} |")
    mean = float(np.exp(np.mean(np.log(ratios))))
    lines += [
        "",
        f"Geometric mean of the last column: {mean:.2f}. Codewords are so many times longer, and "
        "so many more, so that more tokens are wanted to learn them; the distance of held-out from "
        "in-sample errors shows how far this text is from enough. Attention reads as many bytes as "
        "before, but looks up so many times more codes for each head; the kernels for GPUs and "
        "TPUs do not take such codes.",
        "",
    ]
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measures, writes the result file, and the document from it."""
    file = config.out / "results" / "heads-together.json"
    if not config.render:
        flags = [
            "--model",
            pathlib.Path(config.model).name,
            "--text",
            pathlib.Path(config.text).name,
        ]
        for name in ("sequences", "held_out", "length", "layers", "bits", "codewords"):
            given, usual = getattr(config, name), getattr(Config, name)
            if given != usual:
                numbers = given if isinstance(given, tuple) else (given,)
                flags += [f"--{name.replace('_', '-')}", *map(str, numbers)]
        write_result(
            file,
            list(run(config)),
            command=shlex.join(["python", "benchmarks/heads_together.py", *flags]),
            model=pathlib.Path(config.model).stem,
            tokens=config.sequences * config.length,
        )
    document = markdown(json.loads(file.read_text(encoding="utf-8")))
    (config.out / "docs").mkdir(parents=True, exist_ok=True)
    (config.out / "docs" / "heads-together.md").write_text(document, encoding="utf-8")
    print(document)


if __name__ == "__main__":
    commands.run(Config, main, None)
