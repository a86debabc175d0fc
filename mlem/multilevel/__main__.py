"""`python -m mlem.multilevel`: see `mlem.multilevel.command`."""

import sys

from mlem.multilevel.command import main

if __name__ == "__main__":
    sys.exit(main())
