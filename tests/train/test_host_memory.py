import platform
import resource
import subprocess
import sys

import pytest

FAULTS_OF_A_STEP = """
import resource, sys
import torch
from megamup.train.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()


def step():  # tensors of 40 MB, beyond what glibc learns to keep
    tensors = [torch.ones(10_000_000) for _ in range(4)]


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


for _ in range(4):
    step()
before = faults()
step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_a_step_frees_is_there_for_the_next_one() -> None:
    def faults(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS_OF_A_STEP, mode], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    pages = 4 * 40_000_000 / resource.getpagesize()
    assert faults("kept") < 0.05 * pages
    assert faults("given back") > 0.2 * pages  # else there is nothing to mend
