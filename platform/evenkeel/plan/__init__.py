"""Decisions as pure functions: what they return is the decision and, where one was made, its reason in words.

samples    which samples micro-batch m of step s consists of
schedule   the order of forward and backward passes in one pipeline stage
batch      how micro-batches are shared out over pipelines of unequal speed
cuts       where a model is cut into pipeline stages
state      which slices of the training state a place of a layout holds
reshard    who sends which slice to whom when the holders change
layout     who gets which place; `units` forms TP groups, `assign` gives them places

For unequal devices, before anybody is here (`evenkeel plan`):

cost        seconds of a layer and of what is sent, bytes of a stage; `pipelines`: of a pipeline in 1F1B
parallel    the plan with the shortest step; `formations` is about one pipeline, `selection` about how many of which
"""
