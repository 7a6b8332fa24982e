"""Posteriors behind other libraries' interfaces; each file needs the library that it is for.

`pipeline`: transformers' pipelines. `estimator`: scikit-learn. `rewards`: TRL's reward functions.
`harness`: EleutherAI's evaluation harness.
"""
