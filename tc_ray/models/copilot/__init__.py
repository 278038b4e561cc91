"""The Copilot: a decoder that reads errors instead of tokens (paper section 3.1, appendix E.2).

May import: models/pilot and the single-file modules of models. Read first: `model.py`, then `stacks.py`.
"""

from tc_ray.models.copilot.batch import CopilotBatch
from tc_ray.models.copilot.model import Copilot
from tc_ray.models.copilot.stacks import CopilotConfig

__all__ = ["Copilot", "CopilotBatch", "CopilotConfig"]
