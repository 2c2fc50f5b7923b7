"""It is quiet while code of others runs, and as it was afterwards."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import wnsurgery as wn
from wnsurgery.silence import silenced

RUN = [sys.executable, "-c"]
LATE = """
import sys, threading
from wnsurgery.silence import silenced
out, first, second = sys.stdout, threading.Event(), threading.Event()
def other():
    with silenced():
        first.set()
        second.wait(20)
        print("unheard")
with silenced():
    thread = threading.Thread(target=other)
    thread.start()
    first.wait(20)
    out.write("unheard")
assert sys.stdout is not out
second.set()
thread.join()
assert sys.stdout is out
print("heard")
sys.exit("an error")
"""
WAITING = """
import os, sys, threading, time
from wnsurgery.silence import silenced
threading.Thread(target=input, daemon=True).start()
time.sleep(0.5)
with silenced():
    pass
os.write(1, b"done")
os._exit(0)
"""


def test_the_last_of_several_threads_gives_the_streams_back() -> None:
    done = subprocess.run([*RUN, LATE], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("heard\n", "an error\n")


def test_nobody_waits_for_a_terminal() -> None:
    """Another thread may be waiting for input."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(sys.executable, [*RUN, WAITING])
    found = b""
    while b"done" not in found and select.select([terminal], [], [], 60)[0]:
        try:
            found += os.read(terminal, 100)
        except OSError:
            break
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"done" in found


class Talking(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("unheard")
        sys.stdout.buffer.write(b"unheard")
        os.write(sys.stderr.fileno(), b"unheard")
        warnings.warn("unheard", stacklevel=1)
        return super().forward(x)


def test_models_that_talk(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = Talking(3, 3), torch.ones(1, 3)
    wn.verify(model, model, x)  # which imports packages that add filters
    filters = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: wn.verify(model, model, x).ok, range(20)))
    assert capfd.readouterr() == ("", "")
    assert warnings.filters == filters
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def descriptors() -> int:
    """How many are open, where the system tells."""
    return len(list(Path("/proc/self/fd").glob("*")))


def test_an_interrupt_leaves_it_as_it_was() -> None:
    before, count = (sys.stdout, sys.stderr), descriptors()
    for _ in range(20):
        with pytest.raises(KeyboardInterrupt), silenced(), silenced():
            raise KeyboardInterrupt
    assert (sys.stdout, sys.stderr) == before
    assert descriptors() == count
