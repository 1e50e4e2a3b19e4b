"""Data sets: files by content, read once when they come in, so that every fault is told before anybody trains."""
