"""Waits three seconds for processes that never come."""

from jepax.distributed import multihost

if __name__ == "__main__":
    multihost.initialize(wait=3)
