"""Tokenizers against transformers' and sentencepiece's ids, and what they do with bad files."""

import datetime
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from gsrq_jax.errors import InputError
from gsrq_jax.models import tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def fields(**values):
    """Metadata of a byte-level tokenizer: the 256 bytes, then what is given as ``more``."""
    more = values.pop("more", [])
    types = values.pop("types", [1] * len(more))
    return {
        f"tokenizer.ggml.{key}": value
        for key, value in (
            {
                "model": "gpt2",
                "pre": "gpt-2",
                "tokens": [*BYTES, *more],
                "token_type": [1] * len(BYTES) + types,
                "merges": [],
            }
            | values
        ).items()
        if value is not None
    }


def words(tokens, text):
    return [tokens.decode([i]) for i in tokens.encode(text)]


# SentencePiece


@pytest.fixture
def sentencepiece(gguf_goldens):
    return json.loads((gguf_goldens / "sentencepiece.json").read_text("utf-8"))


def from_sentencepiece(golden, **values):
    keys = {key: golden[key] for key in ("tokens", "scores", "token_type")}
    keys |= {"model": "llama", "unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in (keys | values).items()})


def test_ids_are_sentencepieces(sentencepiece):
    tokens = from_sentencepiece(sentencepiece)
    for entry in sentencepiece["texts"]:
        assert tokens.encode(entry["text"], add_bos=False) == entry["ids"], entry["text"]
        assert tokens.decode(entry["ids"]) == entry["text"]
        assert "".join(tokens.stream(entry["ids"])) == entry["text"]


def test_sentencepiece_begins_with_bos_unless_the_file_says_otherwise(sentencepiece):
    tokens = from_sentencepiece(sentencepiece)
    assert (tokens.bos, tokens.eos) == (1, 2)
    assert tokens.encode("a") == [1, *tokens.encode("a", add_bos=False)]
    assert not from_sentencepiece(sentencepiece, add_bos_token=False).add_bos


def test_sentencepiece_without_its_leading_space(sentencepiece):
    tokens = from_sentencepiece(sentencepiece, add_space_prefix=False)
    ids = tokens.encode("the License", add_bos=False)
    assert tokens.decode(ids) == "the License"
    assert not sentencepiece["tokens"][ids[0]].startswith("▁")
    ids = tokens.encode(" the", add_bos=False)
    assert sentencepiece["tokens"][ids[0]].startswith("▁")
    assert tokens.decode(ids) == " the"


def test_control_tokens_of_sentencepiece(sentencepiece):
    tokens = from_sentencepiece(sentencepiece)
    ids = tokens.encode("</s>a", add_bos=False)
    assert ids[0] == 2
    assert tokens.decode(ids) == "a"
    assert tokens.decode(ids, skip_special=False) == "</s> a"


# Byte-level BPE


@pytest.mark.demo_model
def test_demo_model_as_transformers(read_demo_model, gguf_goldens):
    golden = json.loads((gguf_goldens / "tokens.json").read_text("utf-8"))
    *_, tokens = read_demo_model
    for entry in golden["texts"]:
        assert tokens.encode(entry["text"]) == entry["ids"], entry["text"]
        assert tokens.decode(entry["ids"]) == entry["decoded"]
        assert "".join(tokens.stream(entry["ids"])) == entry["decoded"]
    for entry in golden["chats"]:
        prompt = entry["add_generation_prompt"]
        assert tokens.chat(entry["messages"], add_generation_prompt=prompt) == entry["text"]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "  ", " 1234", "'", "S"]),
        ("smollm", ["It", "'s", "   ", "1", "2", "3", "4", "'", "S"]),
        ("qwen2", ["It", "'s", "  ", " ", "1", "2", "3", "4", "'S"]),
        ("llama-bpe", ["It", "'s", "  ", " ", "123", "4", "'S"]),
    ],
)
def test_how_text_is_split(pre, pieces):
    """One token a piece: every piece's bytes are merged pairwise from the left."""
    merges, more = [], []
    for piece in sorted({"Ġ" * n for n in (2, 3)} | {p.replace(" ", "Ġ") for p in pieces}):
        for end in range(2, len(piece) + 1):
            if piece[:end] not in more:
                more.append(piece[:end])
                merges.append(f"{piece[: end - 1]} {piece[end - 1]}")
    tokens = tokenizer.from_gguf(fields(pre=pre, more=more, merges=merges))
    assert words(tokens, "It's   1234'S") == pieces


def test_llama3_takes_whole_words_from_the_vocabulary_and_begins_with_bos():
    values = {"more": ["word", "<|b|>"], "types": [1, 3], "bos_token_id": 257}
    assert words(tokenizer.from_gguf(fields(**values)), "word") == list("word")
    tokens = tokenizer.from_gguf(fields(pre="llama-bpe", **values))
    assert tokens.encode("word") == [257, 256]
    assert tokens.encode("word", add_bos=False) == [256]


def test_qwen2_composes_accents():
    plain, qwen = (tokenizer.from_gguf(fields(pre=pre)) for pre in ("gpt-2", "qwen2"))
    assert qwen.encode("e\u0301") == plain.encode("é") != plain.encode("e\u0301")


def test_control_and_user_defined_tokens():
    tokens = tokenizer.from_gguf(fields(more=["<|c|>", "<think>", "<|n|>"], types=[3, 4, 1]))
    ids = tokens.encode("<|c|><think>")
    assert ids == [256, 257]
    assert tokens.decode(ids) == "<think>"  # only control tokens are skipped
    assert tokens.decode(ids, skip_special=False) == "<|c|><think>"
    assert len(tokens.encode("<|n|>")) == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "bert"}, "of the kind 'bert', not 'gpt2' or 'llama'"),
        ({"pre": "deepseek-llm"}, "splits text the way 'deepseek-llm', which is not one of gpt-2"),
        ({"pre": None}, "splits text the way None"),
        ({"merges": None}, "has no merges"),
        ({"merges": ["a"]}, "tokenizer is damaged"),
        ({"merges": ["a zebra"]}, "tokenizer is damaged"),
        ({"tokens": []}, "tokenizer is damaged: 0 tokens, 256 token types"),
        ({"token_type": [1]}, "256 tokens, 1 token types"),
        ({"model": "llama"}, "lacks its scores"),
    ],
)
def test_gguf_tokenizers_that_would_be_wrong(values, message):
    with pytest.raises(InputError, match=message):
        tokenizer.from_gguf(fields(**values))


def test_no_tokenizer_at_all():
    assert tokenizer.from_gguf({}) is None
    assert tokenizer.from_gguf({"tokenizer.ggml.model": "no_vocab"}) is None


# Streaming


def test_streams_never_cut_a_character():
    tokens = tokenizer.from_gguf(fields(more=["<|c|>"], types=[3]))
    text = "aé日👩‍👧 end"
    ids = tokens.encode(text)  # a token a byte
    assert len(ids) == len(text.encode())
    assert list(tokens.stream(ids)) == list(text)
    cut = [*ids[:2], 256]
    assert list(tokens.stream(cut)) == ["a", "\ufffd"]  # never finished: shown at the end
    assert list(tokens.stream([256, *ids[1:3]])) == ["é"]
    assert list(tokens.stream([ids[2], ids[0]])) == ["\ufffda"]
    assert list(tokens.stream([])) == []


def test_streams_are_lazy():
    tokens = tokenizer.from_gguf(fields())
    (a,) = tokens.encode("a")

    def ids():
        yield a
        raise RuntimeError("asked for more than was needed")

    assert next(tokens.stream(ids())) == "a"


# Chat templates


def chatty(template, **values):
    values = {"more": ["<s>", "</s>"], "types": [3, 3], "bos_token_id": 256, "eos_token_id": 257}
    return tokenizer.from_gguf(fields(**values) | {"tokenizer.chat_template": template})


USER = [{"role": "user", "content": "hi & <bye>"}]


def test_templates_see_what_transformers_gives_them():
    template = """\
{% for message in messages %}
    {% if message.role == "system" %}
        {% continue %}
    {% endif %}
{{ bos_token }}{{ message.content }}{{ eos_token }}|
{% endfor %}
{% generation %}{{ messages | tojson }}{% endgeneration %}
{{ strftime_now("%Y") }}{{ thinking }}
{% if add_generation_prompt %}>{% endif %}"""
    tokens = chatty(template)
    assert tokens.has_chat_template
    year = datetime.datetime.now().year
    text = tokens.chat([{"role": "system", "content": "x"}, *USER], thinking=False)
    messages = json.dumps([{"role": "system", "content": "x"}, *USER])
    assert text == f"<s>hi & <bye></s>|\n{messages}{year}False\n>"
    assert not tokens.chat(USER, add_generation_prompt=False).endswith(">")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "messages: roles must alternate"),
        ("{% for", "cannot render"),
        ("{{ messages[3].content }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "cannot render .*unsafe"),
        (None, "no chat template; give a plain prompt"),
    ],
)
def test_templates_that_fail(template, message):
    with pytest.raises(InputError, match=message):
        chatty(template).chat(USER)


# Hugging Face folders


def folder(path, *, config=None, processor=True, template=None):
    backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(BYTES)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    if processor:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return tokenizer.from_folder(path)


NAMED = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


def test_folder(tmp_path):
    assert tokenizer.from_folder(tmp_path) is None
    tokens = folder(tmp_path, config=NAMED | {"chat_template": "{{ eos_token }}"})
    assert (tokens.bos, tokens.eos, tokens.add_bos) == (256, 257, True)
    assert tokens.encode("hello")[0] == 256  # the processor's, and neither cut nor padded
    assert tokens.decode(tokens.encode("hello")) == "hello"
    assert tokens.encode("a") == [256, *tokens.encode("a", add_bos=False)]
    assert tokens.chat(USER) == "</s>"


@pytest.mark.parametrize(
    ("config", "processor", "add_bos"),
    [
        (NAMED, False, False),
        (NAMED | {"add_bos_token": True}, False, True),
        (NAMED | {"add_bos_token": False}, True, False),
        (NAMED | {"bos_token": None}, True, False),
        (None, True, False),
    ],
)
def test_whether_a_folder_begins_with_bos(tmp_path, config, processor, add_bos):
    assert folder(tmp_path, config=config, processor=processor).add_bos == add_bos


def test_templates_of_a_folder(tmp_path):
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert folder(tmp_path, config={"chat_template": several}).chat(USER) == "d"
    assert folder(tmp_path, config={"chat_template": several}, template="own").chat(USER) == "own"
    assert not folder(tmp_path.joinpath("x").mkdir() or tmp_path / "x").has_chat_template


def test_folders_that_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        tokenizer.from_folder(tmp_path)
    folder(tmp_path)
    for text in ("{", "[]", '{"chat_template": [1]}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(InputError, match="not a tokenizer's configuration"):
            tokenizer.from_folder(tmp_path)
