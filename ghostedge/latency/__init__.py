"""How long a model takes, on this machine and on others."""
