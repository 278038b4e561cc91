"""Events of a request's generations and scorings, put in the order in which a client reads them.

Invariant: of each choice come its echo, its text, its end, in this order; an echo with log-probabilities waits for the
scores, and the choice's text waits for the echo. Used by the routes and streams, once a request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from tc_ray.serving.engine import Event, Finished, Piece, Scored
from tc_ray.serving.http.answers import FinishReason
from tc_ray.serving.http.feed import Feed
from tc_ray.serving.http.generate import Plan
from tc_ray.serving.http.shapes import ChoiceText, Ends, Part

Told = tuple[int, Part, FinishReason | None]
"""Index of a choice, more of it, and how it ended (None: it goes on)."""


class Assembly:
    """Makes parts of choices of events. `ends`: how the choices ended, so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ends = Ends(plan)
        tells = plan.named_tokens is not None or plan.explain
        self._choices = [ChoiceText(plan.served.encoder.texts, tells) for _ in range(plan.choices)]
        self._held: dict[int, list[Event]] = {index: [] for index in range(plan.choices)}
        """Events of choices whose beginning has not been told."""

    async def parts(self, feed: Feed) -> AsyncIterator[Told]:
        """All there is to tell. Raises RequestError when something failed."""
        for prompt in range(self.plan.prompts):
            if not self.plan.scorings or self.plan.scorings[prompt].complete:
                for told in self._begin(prompt):
                    yield told
        async for place, event in feed.events():
            for told in self._take(place, event):
                yield told

    def _take(self, place: int, event: Event) -> Iterator[Told]:
        if isinstance(event, Scored):
            prompt, scoring = self.plan.scoring_of(place)
            if scoring.take(place, event):
                yield from self._begin(prompt)
        elif place in self._held:
            self._held[place].append(event)
        else:
            yield from self._tell(place, event)

    def _begin(self, prompt: int) -> Iterator[Told]:
        plan = self.plan
        for index in range(prompt * plan.n, (prompt + 1) * plan.n):
            if plan.echoes:
                echo = plan.echoes[prompt]
                tokens = plan.scorings[prompt].tokens() if plan.scorings else ()
                yield index, self._choices[index].echo(echo.text, echo.begins, tokens), None
            if not plan.generations:
                yield index, Part(""), "length"
            for event in self._held.pop(index):
                yield from self._tell(index, event)

    def _tell(self, index: int, event: Event) -> Iterator[Told]:
        if isinstance(event, Finished):
            self.ends.found[index] = event
            yield index, self._choices[index].rest(), event.finish_reason
        elif isinstance(event, Piece) and (part := self._choices[index].piece(event)) is not None:
            yield index, part, None


async def collected(assembly: Assembly, feed: Feed) -> list[Part]:
    """Each choice as one part."""
    parts: list[list[Part]] = [[] for _ in range(assembly.plan.choices)]
    async for index, part, _ in assembly.parts(feed):
        parts[index].append(part)
    return [Part.joined(of_choice) for of_choice in parts]
