"""Text encoders of transformers: the real classes, from tiny configs, and tokenizers of letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["clip", "clip_tokenizer", "t5", "t5_tokenizer"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIPTextModel, or with a projection one that has it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
        pad_token_id=len(WORDS) - 1,
        projection_dim=projection or 512,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def clip_tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer, whose vocabulary is written into the folder."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def t5(width: int) -> Any:
    """A T5EncoderModel."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def t5_tokenizer() -> Any:
    """A tokenizer of letters with T5's special tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (" ", -3.0), *((letter, -3.0) for letter in LETTERS)]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(pieces, unk_id=2)),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )
