"""Reads batches in two worker processes for as long as it is let: what the tests of workers start and kill."""

from jepax.cli import exit_with
from jepax.data import batches
from jepax.types import UserError
from tests.contracts.shrink import shrunk


def main() -> None:
    from jepax.data import open_source

    source = open_source(shrunk("ijepa_fashion_mnist").data, "train")
    stream = batches(source, batch_size=16, steps=10_000_000, seed=0, num_threads=1, num_workers=2)
    for count, _ in enumerate(stream):
        if count == 20:
            print("reading", flush=True)


if __name__ == "__main__":  # the workers import this file again
    try:
        main()
    except UserError as error:
        exit_with(str(error), 2)
