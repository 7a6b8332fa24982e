"""Jobs that run in threads of their own, at once."""

import threading

ROUNDS = 8


def in_threads(jobs):
    """Run each job several times in a thread of its own; return all results and errors."""
    results, errors = [[] for _ in jobs], []
    start = threading.Barrier(len(jobs))

    def work(job, mine):
        start.wait()
        for _ in range(ROUNDS):
            try:
                mine.append(job())
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors


def beside(module, job, other):
    """Run a job, and from inside a module, which it runs, another in a thread of its own.

    The other has half a second to end before the first goes on, unless it waits for the first.

    Returns:
        What both return; an exception of the other as it is.
    """
    found = []

    def work():
        try:
            found.append(other())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)

    def meanwhile(*_):
        handle.remove()
        thread.start()
        thread.join(0.5)

    handle = module.register_forward_pre_hook(meanwhile)
    own = job()
    thread.join()
    return own, found[0]
