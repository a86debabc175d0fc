"""Sample from a trained family or level: `python sample.py --help`."""

from mlem.cli import sample

if __name__ == "__main__":
    sample()
