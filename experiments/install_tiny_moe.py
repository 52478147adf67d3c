"""Make a training run of tiny-moe the model in the box.

    python experiments/install_tiny_moe.py runs/tiny-moe-0 runs/tiny-moe-1

takes the model from the first folder and, for the model card, the figures of both.
"""

import argparse
from pathlib import Path

from tiny_moe.card import install


def main() -> None:
    """Read the command line and install."""
    parser = argparse.ArgumentParser(description="Make a run of tiny-moe the model in the box.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training runs")
    install(parser.parse_args().runs)


if __name__ == "__main__":
    main()
