"""Tracking of a run: the files that `tc-ray status` reads, MLflow, the loss plot and the progress view.

Stands on `tc_ray.config` only. `tracker.start_tracker` is what the job calls; everything else is read from the run folder.
"""
