"""The search: which trials run, where, and when they stop. Nothing here decides about learning.

Reading order: `space.py` (distributions -> points -> trial configs), `plan.py` (everything that is
checked or estimated before a trial starts), `cluster.py` (the Ray cluster), `search.py` (Ray Tune),
`propose.py` (which trial is next), `schedule.py` (which stops early), `spend.py` (when it is over),
`repeats.py` (the best once more), `trainable.py` (one trial in Tune's process) and `workers.py`
(one in several), `progress.py` and `tracking.py` (who is told meanwhile).
"""
