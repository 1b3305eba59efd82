"""`kvist doctor`: what keeps a server from starting or from serving well here, with the remedy of each fault.

`collect.py` reads the facts, `checks.py` judges them and is pure, `command.py` prints the findings."""
