"""The fused model: Pilot and Copilot decoding together, `p~ = p + lam f` (equation 8, algorithm 2)."""

from tc_ray.models.fusion.distribution import SPACES, fuse
from tc_ray.models.fusion.explain import Explain, Explanation
from tc_ray.models.fusion.feedback import FEEDBACKS
from tc_ray.models.fusion.folder import write_settings
from tc_ray.models.fusion.lens_picture import draw_logit_lens
from tc_ray.models.fusion.model import FusedModel
from tc_ray.models.fusion.scoring import Scores

__all__ = [
    "FEEDBACKS",
    "SPACES",
    "Explain",
    "Explanation",
    "FusedModel",
    "Scores",
    "draw_logit_lens",
    "fuse",
    "write_settings",
]
