"""Processes of their own, to which a test hands its work."""

import multiprocessing
import socket


def exit_codes(worker, folder, count=2, patience=300):
    """Run a worker in several processes and return their exit codes.

    Args:
        worker: Called with the process's rank, a free port of this machine and the folder; must be
            importable by name.
        folder: Where it leaves what it found.
        count: How many processes.
        patience: Seconds to wait for each; then it is killed.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [context.Process(target=worker, args=(rank, port, folder)) for rank in range(count)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(timeout=patience)
    codes = [process.exitcode for process in workers]
    for process in workers:
        process.kill()
    return codes
