"""Train a level or a family: `python train.py --help`."""

from mlem.cli.main import train

if __name__ == "__main__":
    train()
