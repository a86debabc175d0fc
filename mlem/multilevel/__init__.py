"""Multilevel sampling: the noise estimate is a sum over levels of a family, most of them rarely evaluated."""
