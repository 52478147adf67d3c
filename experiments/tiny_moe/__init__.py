"""How tiny-moe is made: its words, its texts, its exam, its training."""
