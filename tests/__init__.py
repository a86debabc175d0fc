"""Tests; mlem is imported before torch, whose threads shall not spin."""

import mlem  # noqa: F401
