"""The network: read `config.py` for its switches, then `llama.py` from top to bottom."""
