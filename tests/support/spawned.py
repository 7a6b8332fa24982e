"""Processes of their own, to which a test hands its work."""

import multiprocessing
import os
import socket
import time
from unittest.mock import patch

# Ten times what the longest takes on two free cores: beside other work it takes several times that.
PATIENCE = 900
# What one process may need to notice that the last of the others has ended.
FAREWELL = 60


def exit_codes(worker, folder, count=2):
    """Run a worker in several processes and return their exit codes.

    Args:
        worker: Called with the process's rank, a free port of this machine and the folder; must be
            importable by name.
        folder: Where it leaves what it found.
        count: How many processes. What still runs in the end is killed; its code is None.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [context.Process(target=worker, args=(rank, port, folder)) for rank in range(count)]
    # MKL's functions of vectors do not follow torch.set_num_threads, and several processes with
    # several threads each wait for one another on few cores, ten times as long as they compute.
    with patch.dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"):
        for process in workers:
            process.start()
    until = time.monotonic() + PATIENCE
    for process in workers:
        process.join(timeout=max(until - time.monotonic(), FAREWELL))
    codes = [process.exitcode for process in workers]
    for process in workers:
        process.kill()
    return codes
