"""Waits three seconds for processes that never come."""

from jepax.distributed import multihost

if __name__ == "__main__":
    multihost.initialize(timeout_s=3)
