"""`python -m mlem.report`: see `mlem.report.command`."""

import sys

from mlem.report.command import main

if __name__ == "__main__":
    sys.exit(main())
