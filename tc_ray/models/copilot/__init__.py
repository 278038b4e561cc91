"""The Copilot: a decoder that reads errors instead of tokens (paper section 3.1, appendix E.2)."""

from tc_ray.models.copilot.batch import CopilotBatch
from tc_ray.models.copilot.config import CopilotConfig
from tc_ray.models.copilot.model import Copilot

__all__ = ["Copilot", "CopilotBatch", "CopilotConfig"]
