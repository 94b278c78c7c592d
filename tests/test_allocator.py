"""The allocator's settings, in a process of their own: they hold until it ends."""

import subprocess
import sys

CODE = """
import resource
from jepax.allocator import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit(3)
import numpy as np
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): np.ones(8_000_000)
before = faults()
for _ in range(10): np.ones(8_000_000)
raise SystemExit(faults() - before > 1000)
"""


RETURNED = """
import re
from jepax.allocator import keep_freed_memory, return_freed_memory
if not keep_freed_memory():
    raise SystemExit(3)
import numpy as np
def held(): return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
before = held()
array = np.ones(30_000_000)
del array
kept = held() - before
return_freed_memory()
raise SystemExit(not (kept > 200 and held() - before < 20))
"""


def test_freed_memory_is_returned_when_asked():
    assert subprocess.run([sys.executable, "-c", RETURNED], check=False).returncode in (0, 3)


def test_freed_memory_is_not_faulted_in_again():
    """Ten arrays of 64 MB would fault in 156,000 pages of 4 kB; those of the first are used again."""
    assert subprocess.run([sys.executable, "-c", CODE], check=False).returncode in (0, 3)
