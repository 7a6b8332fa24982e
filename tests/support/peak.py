"""The peak of the memory that torch takes on the processor, without the clock or the system."""

from torch.profiler import ProfilerActivity, profile


def peak_of(function):
    """Return the most bytes of tensors that a function held at once, beyond those before it."""
    options = {"profile_memory": True, "acc_events": True}  # torch 2.11 warns without the latter
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        kept = function()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        held += change
        most = max(most, held)
    del kept
    return most
