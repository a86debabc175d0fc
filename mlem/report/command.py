"""The command `mlem.report`: write the report.html of a run folder again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlem.invocation import called, command, in_words_of_the_user, interrupted
from mlem.report import write_report

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path; return the exit code: 0, or 2 with one line for a folder without a run."""
    parser = argparse.ArgumentParser(command("report"), description="Write the report.html of a run folder again.")
    parser.add_argument("folder", help="of a run, such as runs/digits or runs/digits/unet_s")
    try:
        print(write_report(parser.parse_args(arguments).folder))
    except (ValueError, OSError) as error:
        print(f"{called('report')}: {in_words_of_the_user(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return interrupted("report", "the page is unchanged; run the same command again")
    return 0
