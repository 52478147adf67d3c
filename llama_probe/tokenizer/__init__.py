"""Text to token ids and back: one class over the libraries `tokenizers` and `sentencepiece`."""

from llama_probe.tokenizer.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
