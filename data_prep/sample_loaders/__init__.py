"""Code that energon runs to make its own sample types of our samples.

Each module is copied beside an energon dataset's index, so it imports nothing of ours.
"""
