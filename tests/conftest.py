"""What all tests share."""

from hypothesis import settings

settings.register_profile("pegbox", deadline=None)  # no timed assertion: shared cores may stall at any moment
settings.load_profile("pegbox")
