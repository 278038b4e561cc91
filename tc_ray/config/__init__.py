"""Every setting of a run and of serving: strict typed sections, and how they are read and saved.

May import `files` and `text` only; loads neither torch nor ray. Read `schema.py` first (the one document, `RunConfig`), then
`load.py` (YAML and overrides). Whether a field may change on resume stands on the field: `section.MayChange`.
"""
