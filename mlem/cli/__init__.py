"""The command line. The only code that knows Hydra; `mlem.cli.main` has the entry points."""
