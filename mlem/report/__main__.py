"""`python -m mlem.report RUNFOLDER`: write the folder's report.html again."""

from __future__ import annotations

import argparse
import sys

from mlem.report import write_report


def main(arguments: list[str] | None = None) -> None:
    """Write the page and say where it is; exit status 2 and one line for a folder that holds no run."""
    parser = argparse.ArgumentParser(prog="python -m mlem.report", description=main.__doc__)
    parser.add_argument("folder", help="of a run, such as runs/digits or runs/digits/unet_s")
    try:
        print(write_report(parser.parse_args(arguments).folder))
    except (ValueError, OSError) as error:
        print(f"mlem.report: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
