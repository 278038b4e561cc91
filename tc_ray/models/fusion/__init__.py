"""The fused model: Pilot and Copilot decoding together, `p~ = p + lam f` (equation 8, algorithm 2).

May import: the rest of models. Read first: `core.py` (one call of both models); then `scoring.py`, `explain.py`,
`generation.py`, `model.py`. `lens_picture.py` draws the logit lens.
"""

from tc_ray.models.fusion.core import fuse
from tc_ray.models.fusion.explain import Explain, Explanation
from tc_ray.models.fusion.lens_picture import draw_logit_lens
from tc_ray.models.fusion.model import FusedModel
from tc_ray.models.fusion.scoring import Scores

__all__ = ["Explain", "Explanation", "FusedModel", "Scores", "draw_logit_lens", "fuse"]
