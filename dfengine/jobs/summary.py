"""What a run came to."""

from __future__ import annotations

import heapq
from collections import Counter

from dfengine.errors import is_known
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
        self._defects = 0
        self._first_defect = ""

    def add(self, score: VideoScore) -> None:
        self.statuses[score.status] += 1
        if score.error:
            self.errors[score.error.type] += 1
            if not is_known(score.error.type):
                self._defects += 1
                self._first_defect = self._first_defect or f"{score.error.type}: {score.error.message}"
        if score.status == "ok":
            self.spent[f"{score.mode}, {score.sampling}, {len(score.members)} members"] += 1
        if score.fallback_reason:
            self.fallbacks[score.fallback_reason] += 1
        heapq.heappush(self._slowest, (sum(score.timings.values()), score.path))
        if len(self._slowest) > SLOWEST:
            heapq.heappop(self._slowest)

    @property
    def defect(self) -> str:
        """What is wrong with dfengine, if every one of several videos met an error that it does not know; else ""."""
        videos = self.statuses.total()
        if videos < 2 or self._defects < videos:
            return ""
        return f"all {videos} videos failed, the first with {self._first_defect}; --verbose shows where"

    def slowest(self) -> list[tuple[float, str]]:
        """(seconds, path), the slowest first."""
        return sorted(self._slowest, reverse=True)
