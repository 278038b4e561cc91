"""The exported folder beyond the fused model itself (`models.folder`): find, check and identify one, write a run's, join two.

May import config, models, evaluation (the report's numbers), files and text; serving, the job and the command line use it.
Read `check` first; `write` is the last phase of a run, `join` the work of `tc-ray fuse`.
"""
