"""Loaders that stop in the middle or change between passes."""

import sys

import torch


class Interruption(Exception):
    """Stands for a power cut."""


def interrupted(*args):
    """Take the place of a function, and interrupt."""
    raise Interruption


class Interrupted:
    """A loader that stops in the middle."""

    def __init__(self, data, after):
        self.data, self.after, self.dataset = data, after, data.dataset

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if index == self.after:
                raise Interruption
            yield batch


class Varying:
    """A loader that yields other numbers of batches in each pass, or stops in its middle."""

    def __init__(self, data, *passes, error=None):
        self.data, self.dataset = data, data.dataset
        self.passes, self.error = iter(passes), error

    def __iter__(self):
        count = next(self.passes)
        for index, batch in enumerate(self.data):
            if index < count:
                yield batch
        if self.error is not None and count < len(self.data):
            raise self.error


def interrupted_at(step, job):
    """Raise `KeyboardInterrupt` at one of the places where Python looks for signals.

    These are where a function begins and where a built-in one has returned. They are counted from
    1, of all that a job runs.

    Returns:
        Whether the job has so many.
    """
    count = 0

    def look(frame, event, arg):
        nonlocal count
        if event in ("call", "c_return"):
            count += 1
            if count == step:
                raise KeyboardInterrupt  # Python calls this function no more

    before, with_gradients = sys.getprofile(), torch.is_grad_enabled()
    sys.setprofile(look)
    try:
        job()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(before)
        torch.set_grad_enabled(with_gradients)  # torch's own contexts do not survive it
    return count >= step
