"""Goldens for the GGUF reader, in ``tests/models/goldens_gguf/``.

    python tools/make_gguf_golden.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf
        what transformers makes of the demo model: tokens.json, weights.npz, generation.npz;
        needs torch, transformers and gguf
    python tools/make_gguf_golden.py
        a tiny SentencePiece model, trained on the licence: sentencepiece.json; needs sentencepiece

None of these is needed by the package or its tests, but gguf.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).parents[1] / "tests/models/goldens_gguf"
NEW_TOKENS = 40
VOCABULARY = slice(1000, 1256)  # logits kept

PLAIN = "The three primary colours are"
CHAT = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CONVERSATIONS = [
    CHAT,
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hi \n"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2+2?"},
    ],
]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two leading spaces, two trailing  ",
    "It's they're I'VE we'll 'tis don't",
    "a\tb\n\nc \n d\r\n\r\n    e   \n",
    "numbers: 0 7 42 1999 3.14159 1,000,000 x86_64 v2",
    "x  12   345 (67) -8 ٣٤٥ Ⅷ ½ ²",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n\n\tif x != 0: pass\n",
    "Größe, naïve café — “quoted” … €5",
    "日本語のテキスト、中文 한국어 русский ελληνικά العربية हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🇩🇪 🤷🏽 e\u0301 vs é ﬁ \u00a0nbsp \u200bzw",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|not_special|>",
    "https://example.org/a?b=c&d=%20#e {\"k\": [1, null]} <tag attr='v'/> \\frac{a}{b}",
]
WEIGHTS = [
    "model.embed_tokens.weight",
    "model.norm.weight",
    *(
        f"model.layers.{layer}.{name}.weight"
        for layer in (0, 29)
        for name in (
            *("input_layernorm", "post_attention_layernorm"),
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    ),
]


def demo_model(path: Path) -> None:
    import tokenizers
    import torch
    import transformers

    GOLDENS.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers ignores `tokenizer.ggml.pre` = smollm. SmolLM2's own tokenizer.json splits off
    # every digit first, which shows where two spaces stand before a number.
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    ids = {text: backend.encode(text, add_special_tokens=False).ids for text in TEXTS}
    for text in TEXTS:
        if tokenizer(text).input_ids != ids[text]:
            print(f"as SmolLM2, not as transformers reads the GGUF: {text!r}")
    chats = [
        {
            "messages": messages,
            "text": tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt
            ),
            "add_generation_prompt": prompt,
        }
        for messages in CONVERSATIONS
        for prompt in (True, False)
    ]
    tokens = {
        "texts": [
            {"text": text, "ids": ids[text], "decoded": backend.decode(ids[text])} for text in TEXTS
        ],
        "chats": chats,
    }
    (GOLDENS / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False, indent=1) + "\n")

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    state = model.state_dict()
    slices = {}
    for name in WEIGHTS:
        weight = state[name].float().numpy()
        slices[name] = weight.reshape(len(weight), -1)[:: max(1, len(weight) // 32), :8]
        slices[f"{name}:shape"] = np.array(weight.shape)
        slices[f"{name}:norm"] = np.linalg.norm(weight.astype(np.float64))
    np.savez_compressed(GOLDENS / "weights.npz", **slices)

    runs = {}
    prompts = {"plain": PLAIN, "chat": chats[0]["text"]}
    for kind, text in prompts.items():
        prompt = backend.encode(text, add_special_tokens=False).ids
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1]
            sequence = list(prompt)
            margins = []
            for _ in range(NEW_TOKENS):
                top = model(torch.tensor([sequence])).logits[0, -1].topk(2)
                margins.append(float(top.values[0] - top.values[1]))
                sequence.append(int(top.indices[0]))
        new = sequence[len(prompt) :]
        print(f"{kind}: least margin {min(margins):.4f}, {backend.decode(new)!r}")
        runs |= {
            f"{kind}_text": np.array(text),
            f"{kind}_prompt": np.array(prompt, np.int32),
            f"{kind}_new": np.array(new, np.int32),
            f"{kind}_logits": logits[VOCABULARY].numpy(),
            f"{kind}_max": np.float32(logits.max()),
            f"{kind}_logsumexp": np.float32(torch.logsumexp(logits, -1)),
        }
    runs |= {"vocabulary": np.array([VOCABULARY.start, VOCABULARY.stop], np.int32)}
    np.savez_compressed(GOLDENS / "generation.npz", **runs)


def sentencepiece_model() -> None:
    import sentencepiece

    licence = (Path(__file__).parents[1] / "LICENSE").read_text()
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(licence.splitlines()),
        model_writer=stream,
        model_type="bpe",
        vocab_size=600,
        # as LLaMA 2's
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=stream.getvalue())
    pieces = range(model.get_piece_size())

    def kind(i: int) -> int:  # token types of GGUF
        return (
            2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        )

    texts = [text for text in (*TEXTS, *licence.split("\n\n")[2:8]) if text]
    golden = {
        "tokens": [model.id_to_piece(i) for i in pieces],
        "scores": [model.get_score(i) for i in pieces],
        "token_type": [kind(i) for i in pieces],
        "texts": [{"text": text, "ids": model.encode(text)} for text in texts],
    }
    GOLDENS.mkdir(parents=True, exist_ok=True)
    (GOLDENS / "sentencepiece.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    demo_model(Path(sys.argv[1])) if sys.argv[1:] else sentencepiece_model()
