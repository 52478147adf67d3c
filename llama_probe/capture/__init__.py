"""From prompts to activations, in memory or in a store on disk."""

from llama_probe.capture.activations import Activations
from llama_probe.capture.capture import capture
from llama_probe.capture.moments import Moments

__all__ = ["Activations", "Moments", "capture"]
