"""One trial: fine-tune one configuration, with Accelerate, without Ray.

Reading order: `trial.py` (the whole walk of a trial), `loop.py` (batches -> sums), `optim.py`
(who moves, how fast), `ema.py`, `metrics.py`, `checkpoint.py` (what survives), `export.py` (what is
deployed).
"""
