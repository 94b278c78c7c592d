"""The command line in a process of its own: python -m tests.faults.command train CONFIG.yaml --run-dir DIR."""

from jepax.cli import main

if __name__ == "__main__":
    main()
