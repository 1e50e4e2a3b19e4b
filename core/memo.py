"""What was worked out before, kept by what it depends on.

A form is planned anew at every keystroke, and most of them change nothing that takes long: not which samples are
trained, not how they lie. What does take long is asked for through a `Memo`: under the settings that decide it, by
value, and the things that it is made from, by identity, for a hundred thousand lengths are dear to compare. Whoever
asks with other settings, or with facts that were measured anew, gets another answer; the one that was longest not asked
for makes room.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Made = TypeVar("Made")


class Memo:
    """Of at most `most` answers. Threads may share it; two that ask for the same at once may both make it."""

    def __init__(self, most: int) -> None:
        assert most >= 1
        self._most = most
        # The sources lie beside the answer, so that none of their ids is given to something else meanwhile.
        self._known: OrderedDict[Hashable, tuple[tuple[object, ...], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, settings: Hashable, sources: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave. `settings` begin with a word for what is asked. What `make` raises is not
        kept."""
        key = (settings, tuple(map(id, sources)))
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                answer: Made = self._known[key][1]
                return answer
        made = make()
        with self._lock:
            self._known[key] = (sources, made)
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return made
