"""The fused model behind an OpenAI-compatible HTTP endpoint on Ray Serve.

Folders: deploy (start of the server), http (routes), text (prompts to tokens), models (exported runs), engine (the
running batch), failover (streams that outlive a replica), page, chat (in the terminal, without Ray). May import:
cluster (the address of a Ray), config, data/encode, export, models, text. Read first: `deploy/launch.py` for the start, `http/routes.py` for a request; it enters the batch in
`engine/worker.py` (`Worker._join`).
"""
