"""What is trained: model registry, tasks, features, weights, differentially private steps.

Importing this package imports neither torch nor opacus; its modules do.
"""
