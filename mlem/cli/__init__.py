"""What train.py and sample.py call. The only code that knows Hydra; heavy imports wait until options are known good."""

from mlem.cli.main import sample, train

__all__ = ["sample", "train"]
