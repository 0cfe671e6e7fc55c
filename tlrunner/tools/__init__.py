"""The commands of `tlrunner`, a module each: its `arguments`, and `run`, which gives an exit code.

Their tops import little: `tlrunner --help` is answered before torch is loaded.
"""
