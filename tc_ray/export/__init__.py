"""The folder of an exported run, and its Pilot in the forms of other programs.

Find and check a fused folder (`check.py`), write a run's (`write.py`, the last phase of a run), join two models (`join.py`, the work
of `tc-ray fuse`). `pilot.py` is the work of `tc-ray export`, with `gguf_file.py`, `gguf_tokenizer.py`, `compare.py` and `push.py`;
`card.py` and `licence.py` make the model card of every folder. May import: config, models, evaluation (the report's numbers), files,
text. Read first: `check.py`. The format of fusion.json is in `models/folder.py`.
"""
