"""From training data to a posterior's state: passes, snapshots, merging.

What a batch adds is the structure's; this room adds it up.
"""
