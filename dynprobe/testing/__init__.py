"""Small random models for tests, examples and plug-in authors: no network, milliseconds to build."""

from dynprobe.testing._tiny import byte_tokenizer, save_tiny_model, tiny_gpt2, tiny_llama

__all__ = ["byte_tokenizer", "save_tiny_model", "tiny_gpt2", "tiny_llama"]
