"""`jepax bench-data`: the speed of reading images."""

from dataclasses import dataclass

from jepax.commands.bench import BenchOptions


@dataclass(frozen=True)
class BenchData(BenchOptions):
    """Time reading images, per core and against Pillow, and compare with what the recipe's step needs.

    For example: jepax bench-data byol_vits16_in100 --data.root PHOTOS
    """

    def run(self) -> None:
        from jepax.bench.input_bench import input_rows, measure_input
        from jepax.bench.run import publish

        found = measure_input(self.config(), self.repeats)
        publish(found, input_rows(found), self.json)
