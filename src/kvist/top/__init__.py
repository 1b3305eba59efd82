"""`kvist top`: the figures of the dashboard in a terminal.

`source.py` reads them over HTTP, `view.py` lays them out and is pure, `command.py` repeats both."""
