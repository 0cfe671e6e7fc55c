"""The result of a run: what its directory says, for a person and for a program.

Reading order: `rundir.py` (the directory of a run), `lease.py` (who may write it), `summary.py`
(leaderboard.csv and summary.json), `page.py` (report.html), `finish.py` (from finished trials to
_SUCCESS).
"""
