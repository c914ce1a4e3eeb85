"""Small files and fast networks from pruned checkpoints. The experiment (main.py, test.py) imports none of this.

packing.py           write packed files; formats/packed.py reads them
simplification.py    fold BatchNorm into convolutions, remove dead channels
runtimes.py          ways to compute a network on a CPU, and their speed and error
engine/              an engine for CPUs that skips zero weights
tables.py            tables, CSV files and the plot of deploy.py
"""
