"""Drawn examples are the same in every run, and slow machines have time for them."""

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
