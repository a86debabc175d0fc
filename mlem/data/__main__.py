"""`python -m mlem.data`: see `mlem.data.command`."""

import sys

from mlem.data.command import main

if __name__ == "__main__":
    sys.exit(main())
