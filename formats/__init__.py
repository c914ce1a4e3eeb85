"""Files of networks: packed ones of ours, and what other programs write."""
