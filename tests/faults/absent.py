"""Waits three seconds for processes that never come."""

from jepax import hosts

if __name__ == "__main__":
    hosts.start(wait=3)
