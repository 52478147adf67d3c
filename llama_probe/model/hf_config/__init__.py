"""Between Hugging Face's config.json and `LlamaConfig`."""

from llama_probe.model.hf_config.read import from_hf
from llama_probe.model.hf_config.write import to_hf

__all__ = ["from_hf", "to_hf"]
