"""Sample from a trained family or level: `python sample.py --help`."""

from mlem.cli.main import sample

if __name__ == "__main__":
    sample()
