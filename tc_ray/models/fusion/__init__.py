"""The fused model: Pilot and Copilot decoding together, `p~ = p + lam f` (equation 8, algorithm 2)."""

from tc_ray.models.fusion.distribution import SPACES, fuse
from tc_ray.models.fusion.feedback import FEEDBACKS
from tc_ray.models.fusion.folder import write_settings
from tc_ray.models.fusion.model import FusedModel

__all__ = ["FEEDBACKS", "SPACES", "FusedModel", "fuse", "write_settings"]
