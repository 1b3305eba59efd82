"""How a stored page is recognised: its header and seal (seal.py), and the secret that makes seals (secret.py)."""
