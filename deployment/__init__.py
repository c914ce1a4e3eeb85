"""Small files and fast networks from pruned checkpoints. The experiment (main.py, test.py) imports none of this.

packing.py           write packed files; the top-level packed.py reads them
program.py           a network as a list of operations, and its reference in PyTorch
graph.py             read any CNN as a program; rules.py and selection.py say what each function of PyTorch becomes
simplification.py    fold BatchNorm, fuse operations, remove dead channels
model_file.py        write the model file of the engine
engine/              an engine in C for CPUs that skips zero weights
runtimes.py          ways to compute a network on a CPU, and their speed and error
tables.py            tables, CSV files and the plot of deploy.py
"""
