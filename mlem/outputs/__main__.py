"""`python -m mlem.outputs`: see `mlem.outputs.command`."""

import sys

from mlem.outputs.command import main

if __name__ == "__main__":
    sys.exit(main())
