"""The fused model: Pilot and Copilot decoding together, `p~ = p + lam f` (equation 8, algorithm 2).

May import the rest of `models`, `config` and `files`. Modules from the bottom up: distribution, cache, feedback, core (one
call), scoring, explain, generation, model. Read `core` first; the picture is lens_picture's.
"""

from tc_ray.models.fusion.distribution import fuse
from tc_ray.models.fusion.explain import Explain, Explanation
from tc_ray.models.fusion.lens_picture import draw_logit_lens
from tc_ray.models.fusion.model import FusedModel
from tc_ray.models.fusion.scoring import Scores

__all__ = ["Explain", "Explanation", "FusedModel", "Scores", "draw_logit_lens", "fuse"]
