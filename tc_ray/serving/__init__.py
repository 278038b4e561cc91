"""The fused model behind an OpenAI-compatible HTTP endpoint on Ray Serve. Stands on models only; used by the cli."""
