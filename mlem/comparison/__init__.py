"""Comparison of samplers from the same noise: their costs, and their errors to a many-step reference.

entry.py          `Entry`: one line of a list of samplers
setup.py          `Setup`: what all samplers share; `Run`: one of them at one number of steps, before measurement
tally.py          `Tally`: runs it batch by batch and sums error, scores and costs
row.py            `Row`: the result, as JSON (`evaluation.json`) and as CSV (`runs.csv`)
evaluation.py     all samplers in one pass over the images, for training and `trainer.test`
coupled.py        one sampler after another into a CSV that can be resumed
calls.py          which levels run along a trajectory;  recommended.py  the recommendation, saved beside a run
equal_error.py    cost ratios at equal error;  summary.py  those of a CSV;  figures.py  error against cost
scaling.py        the scaling law of a family
"""
