"""What the command line does with a run's checkpoints, beside the run: none of it is needed to train.

choose       the checkpoint that a command means
distrust     which of them may hold a wrong copy of the state, by the run's journal
listing      which checkpoints are there, and in what state
describe     what one checkpoint holds
exporting    what an exported folder has whatever its format
plain        folders of safetensors files: out and in
dcp          torch.distributed.checkpoint's format: out and in; the only module here that needs torch
importing    a checkpoint for a new run, from any of these
text         tables, sizes and times for a terminal or a log
"""
