"""What a run came to."""

from __future__ import annotations

import heapq
from collections import Counter

from dfengine.types import VideoScore

SLOWEST = 5  # videos named


class Summary:
    """What a run came to, without keeping its rows."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()  # mode, sampling and number of members, of answered videos
        self._slowest: list[tuple[float, str]] = []

    def add(self, score: VideoScore) -> None:
        self.statuses[score.status] += 1
        if score.error:
            self.errors[score.error.type] += 1
        if score.status == "ok":
            self.spent[f"{score.mode}, {score.sampling}, {len(score.members)} members"] += 1
        if score.fallback_reason:
            self.fallbacks[score.fallback_reason] += 1
        heapq.heappush(self._slowest, (sum(score.timings.values()), score.path))
        if len(self._slowest) > SLOWEST:
            heapq.heappop(self._slowest)

    def slowest(self) -> list[tuple[float, str]]:
        """(seconds, path), the slowest first."""
        return sorted(self._slowest, reverse=True)
