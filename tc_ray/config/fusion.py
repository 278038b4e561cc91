"""The `fusion` section: how the two models are joined at inference, and how lambda is chosen."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tc_ray.config.section import Lam, Metric, Positive, Section


class RankingSection(Section):
    """Items as answers (fusion.metric: ranking): Hit@K and NDCG@K by beam search over the run's items."""

    cutoffs: list[Positive] = Field(
        default_factory=lambda: [5, 10, 20, 100],
        description="the K of Hit@K and NDCG@K; 10 must be among them, the largest is the number of beams",
    )

    @model_validator(mode="after")
    def _ten_is_there(self) -> RankingSection:
        if 10 not in self.cutoffs:
            raise ValueError("cutoffs must contain 10: lambda is chosen by NDCG@10")
        return self


class FusionSection(Section):
    """How the two models are joined at inference (equation 8) and how lambda is chosen."""

    metric: Metric | None = Field(
        None,
        description="what lambda is chosen by and the test rows are measured with. exact_match: right final answers; choice: "
        "the likeliest of a row's options; ranking: NDCG@10 over the items of data.format: sequences; for free text, where "
        "no answer is exactly right, nll: likelihood of the completion; chrf: chrF of what was decoded against the completion; "
        "module:function: a function of yours that scores what was decoded (docs/extending.md). null: that of data.task, else exact_match",
    )
    choose_option_by: Literal["sum", "token", "character"] | None = Field(
        None,
        description="log-likelihood that ranks options (metric: choice): as it is, or per token or character of them; null: "
        "that of data.task, else sum",
    )
    ranking: RankingSection = Field(default_factory=RankingSection)
    space: Literal["probability", "logits", "choose"] = Field(
        "probability", description="where lambda f is added; choose: the better one on validation data"
    )
    feedback: Literal["own", "realised"] = Field(
        "own", description="Copilot input at inference: its own f, or onehot(chosen token) - p of the Pilot"
    )
    num_beams: Positive = Field(
        1, description="beams that completions are decoded with (metric: exact_match, chrf or a function); 1 is greedy"
    )
    lam_grid: list[Lam] = Field(
        default_factory=lambda: [0.0, 0.1, 0.3, 0.5, 0.8, 1.0],
        description="values of lambda that are tried on the validation rows; 0 must be among them",
    )
    max_new_tokens: Positive = Field(
        64, description="tokens decoded per completion at most (metric: exact_match, chrf or a function)"
    )
    eval_batch_size: Positive = Field(
        32, description="rows that a worker scores or decodes at a time, each with up to three lambdas"
    )
    max_validation_rows: Positive | None = Field(
        None, description="validation rows of each set used to choose lambda; null: all"
    )
    max_test_rows: Positive | None = Field(None, description="test rows of each set evaluated; null: all")

    @model_validator(mode="after")
    def _zero_among_choices(self) -> FusionSection:
        if 0.0 not in self.lam_grid:
            raise ValueError("lam_grid must contain 0.0, so that a Copilot that does not help is found out")
        return self
