"""Text to token ids and back, and chat templates: from a Hugging Face folder or a GGUF file."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from gsrq_jax.errors import InputError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types of a GGUF file


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what a model's files say about using it.

    Attributes:
        backend: of the `tokenizers` library.
        bos, eos: ids of the tokens that begin and end a text, where the files name them.
        add_bos: plain text (no chat template) begins with ``bos``.
        chat_template: Jinja source, or None.
    """

    backend: tokenizers.Tokenizer
    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be used."""
        return self.chat_template is not None

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Token ids of ``text``; special tokens written in it become their ids.

        ``add_bos`` None means as the model's files say. A rendered ``chat`` wants False: its
        template writes the token itself.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        begin = self.add_bos if add_bos is None else add_bos
        return [self.bos, *ids] if begin and self.bos is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; what is not UTF-8 becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, ids: Iterable[int], *, skip_special: bool = True) -> Iterator[str]:
        """``decode`` piece by piece, as the ids come; a character is never cut.

        Joined, the pieces are ``decode`` of all ids. Each step decodes only the piece before and
        what came since, the former so that a leading space is treated as it is in the whole.
        """
        decode = functools.partial(self.decode, skip_special=skip_special)
        before: list[int] = []
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            old, new = decode(before), decode(before + pending)
            if len(new) > len(old) and not new.endswith("\ufffd"):
                yield new[len(old) :]
                before, pending = pending, []
        if rest := decode(before + pending)[len(decode(before)) :]:
            yield rest

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation, as the model's own template writes it.

        Args:
            messages: each with ``role`` and ``content``.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: others that the template knows, such as Qwen3's ``enable_thinking``.

        Raises:
            InputError: if there is no template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InputError("this model has no chat template; give a plain prompt instead")
        try:
            return _compile(self.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=self._token(self.bos),
                eos_token=self._token(self.eos),
                **variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"the chat template cannot render these messages: {error}") from error

    def _token(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """A template in the environment that transformers gives it: sandboxed, blocks trimmed."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def from_folder(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder, or None if it has no ``tokenizer.json``.

    Reads ``tokenizer.json`` and, where present, ``tokenizer_config.json`` and
    ``chat_template.jinja``.

    Raises:
        InputError: if one of them cannot be read.
    """
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file} is not a tokenizer: {error}") from error
    backend.no_padding()
    backend.no_truncation()

    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        bos, eos = (_special(backend, config.get(name)) for name in ("bos_token", "eos_token"))
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a tokenizer's configuration: {error}") from error
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text("utf-8")

    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos is not None and backend.encode("").ids[:1] == [bos]
    return Tokenizer(backend, bos, eos, bool(add_bos), template)


def _special(backend: tokenizers.Tokenizer, token: str | dict | None) -> int | None:
    """Id of a special token as ``tokenizer_config.json`` writes it."""
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else backend.token_to_id(text)


# What a GGUF file's `tokenizer.ggml.pre` stands for: how the model's own tokenizer splits text
# before merging.

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Splitting:
    pattern: str
    single_digits: bool = False  # every digit by itself, before the pattern
    nfc: bool = False
    whole_words: bool = False  # a word in the vocabulary is that token, whatever the merges say
    add_bos: bool = False


_SPLITTINGS = {
    "gpt-2": _Splitting(_GPT2),
    "smollm": _Splitting(_GPT2, single_digits=True),
    "qwen2": _Splitting(_CL100K % 1, nfc=True),
} | dict.fromkeys(
    ("llama-bpe", "llama-v3", "llama3"), _Splitting(_CL100K % 3, whole_words=True, add_bos=True)
)


def from_gguf(fields: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, or None if it holds none.

    Two kinds: ``gpt2``, byte-level BPE with its merges, and ``llama``, SentencePiece BPE with
    scores. The ids are those of the model's own tokenizer; where llama.cpp or transformers'
    reading of GGUF deviates from it (NFC for Qwen, single digits for SmolLM, whole words for
    LLaMA 3), the model's own is followed. SentencePiece gets its leading space after every special
    token too, as in LLaMA 2's ``tokenizer.json`` and llama.cpp.

    Args:
        fields: values of the keys ``tokenizer.*``, as plain numbers, strings and lists.

    Raises:
        InputError: if the text would be split wrongly: another kind, an unknown way of splitting,
            missing or inconsistent lists.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    get = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.ggml.")
    }.get
    tokens = get("tokens") or []
    types = get("token_type") or [NORMAL] * len(tokens)
    if not tokens or len(types) != len(tokens):
        raise InputError(
            f"the file's tokenizer is damaged: {len(tokens)} tokens, {len(types)} token types; "
            "download the file again"
        )
    if kind == "gpt2":
        backend, add_bos = _byte_level(tokens, get("merges"), get("pre"))
    elif kind == "llama":
        backend = _sentencepiece(
            tokens, types, get("scores"), get("unknown_token_id"), get("add_space_prefix", True)
        )
        add_bos = True
    else:
        raise InputError(
            f"the file's tokenizer is of the kind {kind!r}, not 'gpt2' or 'llama'; "
            "load the model from its Hugging Face folder instead"
        )
    backend.add_special_tokens(_added(tokens, types, CONTROL))
    backend.add_tokens(_added(tokens, types, USER_DEFINED))
    return Tokenizer(
        backend,
        get("bos_token_id"),
        get("eos_token_id"),
        bool(get("add_bos_token", add_bos)),
        fields.get("tokenizer.chat_template"),
    )


def _added(tokens: list[str], types: list[int], which: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=which == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind == which and token
    ]


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _byte_level(
    tokens: list[str], merges: list[str] | None, pre: str | None
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether a text begins with BOS unless the file says otherwise."""
    splitting = _SPLITTINGS.get(pre or "")
    if splitting is None:
        raise InputError(
            f"the file's tokenizer splits text the way {pre!r}, which is not one of "
            f"{', '.join(sorted(_SPLITTINGS))}; load the model from its Hugging Face folder instead"
        )
    if merges is None:
        raise InputError("the file's tokenizer has no merges; download the file again")
    try:
        model = models.BPE(
            vocab=_vocabulary(tokens),
            merges=[(left, right) for left, right in (merge.split(" ", 1) for merge in merges)],
            ignore_merges=splitting.whole_words,
        )
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"the file's tokenizer is damaged: {error}") from error
    backend = tokenizers.Tokenizer(model)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    digits = [pre_tokenizers.Digits(individual_digits=True)] * splitting.single_digits
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *digits,
            pre_tokenizers.Split(Regex(splitting.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.add_bos


def _sentencepiece(
    tokens: list[str],
    types: list[int],
    scores: list[float] | None,
    unknown: int | None,
    space_prefix: bool,
) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback."""
    if scores is None or len(scores) != len(tokens):
        raise InputError("the file's tokenizer lacks its scores; download the file again")
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=_vocabulary(tokens),
            merges=_merges(tokens, types, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "▁")
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges whose ranks give SentencePiece's order: the pair whose union scores highest first.

    Ties are broken as in transformers' converter, by the ids of the halves and then their lengths.
    """
    score = {
        token: value
        for token, kind, value in zip(tokens, types, scores, strict=True)
        if kind == NORMAL
    }
    ids = _vocabulary(tokens)
    pairs = []
    for whole in score:
        halves = ((whole[:i], whole[i:]) for i in range(1, len(whole)))
        known = [pair for pair in halves if pair[0] in score and pair[1] in score]
        pairs += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return sorted(
        pairs,
        key=lambda pair: (score[pair[0] + pair[1]], len(pair[0]), len(pair[1])),
        reverse=True,
    )
