"""From prompts to activations, in memory or in a store on disk."""

from llama_probe.capturing.activations import Activations
from llama_probe.capturing.capture import capture
from llama_probe.capturing.moments import Moments

__all__ = ["Activations", "Moments", "capture"]
