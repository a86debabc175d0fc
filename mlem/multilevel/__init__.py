"""Multilevel sampling: a noise estimate that is a sum over the levels of a family, most of them seldom evaluated."""
