"""The search: which trials run, where, and when they stop. Nothing here decides about learning.

Reading order: `space.py` (distributions -> points -> trial configs), `plan.py` (everything that is
checked or estimated before a trial starts), `search.py` (Ray Tune), `trainable.py` (what runs in
its workers), `progress.py` (what a person sees meanwhile).
"""
