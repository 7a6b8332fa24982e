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
