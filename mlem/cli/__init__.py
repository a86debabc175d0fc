"""The command line. The only code that uses Hydra; `mlem.cli.main` has the entry points."""
