"""`jepax bench-data`: the speed of reading images."""

from dataclasses import dataclass

from jepax.commands.bench import BenchOptions


@dataclass(frozen=True)
class BenchData(BenchOptions):
    """Time reading images, per core and against Pillow, and compare with what the recipe's step needs.

    For example: jepax bench-data byol_vits16_in100 --data.root PHOTOS
    """

    def run(self) -> None:
        from jepax.bench import run

        run.bench_data(self.config(), self.repeats, json=self.json)
