"""Every setting of a run and of serving: strict typed sections, and how they are read and saved.

May import: files, text; loads neither torch nor ray. Read first: `schema.py` (the one document, `RunConfig`), then
`load.py` (YAML and overrides). The type of a field says whether it may change on resume (`section.MayChange`).
"""
