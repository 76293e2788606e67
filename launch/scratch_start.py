"""From a folder of real data to what a small Llama is trained from: scratch_start.py DATA OUT

Written into OUT: model/ (byte-level BPE tokenizer trained on the texts; config.json, no weights), texts.jsonl (plain
text, in pieces) and instructions.jsonl (instructions and the chosen replies of HH, all as HH transcripts).
"""

import gzip
import json
import pathlib
import random
import sys

import tokenizers
import transformers

PIECE = 900  # characters of a piece of text, some 230 tokens
PIECES = 8_000  # of the 56,000: what two cores read in about ten minutes
TEXTS = ("classic_books", "fairytales", "tinystories_train", "wikitext2_valid")


def pieces(path: pathlib.Path) -> list[str]:
    """Paragraphs joined up to PIECE characters."""
    found, piece = [], ""
    for paragraph in gzip.open(path, "rt", encoding="utf-8").read().split("\n\n"):
        paragraph = " ".join(paragraph.split())
        for start in range(0, len(paragraph), PIECE):
            part = paragraph[start : start + PIECE]
            if len(piece) + len(part) > PIECE:
                found.append(piece)
                piece = ""
            piece = f"{piece}\n\n{part}" if piece else part
    return [*found, piece]


def rows(path: pathlib.Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def transcript(instruction: str, more: str = "") -> str:
    """A request as HH writes it."""
    return f"\n\nHuman: {instruction}{chr(10) + more if more else ''}\n\nAssistant:"


def main(data: str, out: str, vocabulary: int = 4096, width: int = 160, layers: int = 5) -> None:
    data, out = pathlib.Path(data), pathlib.Path(out)
    (out / "model").mkdir(parents=True, exist_ok=True)
    texts = [piece for name in TEXTS for piece in pieces(data / "text" / f"{name}.txt.gz")]
    random.Random(0).shuffle(texts)
    texts = texts[:PIECES]
    asked = [
        {"prompt": transcript(row["instruction"], row["input"]), "completion": " " + row["output"]}
        for name in ("alpaca_sft", "gpteacher_roleplay")
        for row in rows(data / "instructions" / f"{name}.jsonl.gz")
    ]
    asked += [
        {"prompt": row["prompt"], "completion": row["chosen"]}
        for name in ("helpful_train", "harmless_train_lastturn")
        for row in rows(data / "hh_rlhf" / f"{name}.jsonl.gz")
    ]
    for name, items in (("texts", [{"text": text} for text in texts]), ("instructions", asked)):
        lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([*texts, *(row["prompt"] + row["completion"] for row in asked)], trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(out / "model")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(out / "model")
    print(f"{len(texts)} pieces of text, {len(asked)} instructions and replies, {bpe.get_vocab_size()} tokens → {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
