"""The door: a flood holds its own places and no others, and nobody's turn is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serve_app.batching import Overloaded
from serve_app.door import Door


class Guests:
    """Requests that stay inside until they are told to go."""

    def __init__(self, door: Door) -> None:
        self.door, self.inside = door, list[str]()
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def come(self, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._stay(name))
        await settled()

    async def go(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await settled()

    async def _stay(self, name: str) -> None:
        async with self.door.passed(name[:2]):
            self.inside.append(name)
            try:
                await self._ends[name].wait()
            finally:
                self.inside.remove(name)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def played(story: Callable[[Guests], Awaitable[None]], places: int = 4, waiting: int = 100) -> None:
    async def run() -> None:
        guests = Guests(Door(places, waiting))
        await story(guests)
        for task in guests.tasks.values():
            task.cancel()
        await asyncio.gather(*guests.tasks.values(), return_exceptions=True)

    asyncio.run(run())


def test_a_flood_leaves_the_others_their_places() -> None:
    async def story(guests: Guests) -> None:
        await guests.come(*(f"en{number}" for number in range(50)))
        assert guests.inside == ["en0", "en1"]
        await guests.come("de0", "fr0")
        assert guests.inside == ["en0", "en1", "de0", "fr0"]
        await guests.go("en0")
        assert guests.inside == ["en1", "de0", "fr0", "en2"]

    played(story)


def test_languages_that_wait_take_turns() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "de0", "de1", "de2", "de3", "fr0")
        assert guests.inside == ["en0", "en1", "de0", "de1"]
        await guests.go("de0")  # who has none comes first
        assert guests.inside == ["en0", "en1", "de1", "fr0"]
        await guests.go("en0")
        assert guests.inside == ["en1", "de1", "fr0", "en2"]
        await guests.come("en3")
        await guests.go("fr0")  # en has all that it may have
        assert guests.inside == ["en1", "de1", "en2", "de2"]
        await guests.come("fr1")
        await guests.go("en1")
        assert guests.inside == ["de1", "en2", "de2", "fr1"]

    played(story)


def test_too_long_a_line_is_refused_and_another_is_not() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "en3", "en4")
        with pytest.raises(Overloaded) as refused:
            await guests.tasks["en4"]
        assert (refused.value.status, refused.value.retry_after_s) == (429, 1.0)
        await guests.come("de0")
        assert "de0" in guests.inside

    played(story, waiting=2)


def test_who_goes_while_waiting_loses_nobody_a_place() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "en2", "en3")
        guests.tasks["en2"].cancel()
        await settled()
        await guests.go("en0")
        assert guests.inside == ["en1", "en3"]
        await guests.come("en4")
        guests.tasks["en1"].cancel()  # inside
        await settled()
        assert guests.inside == ["en3", "en4"]
        # Its turn comes and its client goes in the same moment.
        await guests.come("en5", "en6")
        guests._ends["en3"].set()
        guests.tasks["en3"].cancel()
        guests.tasks["en5"].cancel()
        await settled()
        assert guests.inside == ["en4", "en6"]
        for name in ("en4", "en6"):
            await guests.go(name)
        await guests.come("fr0", "fr1", "de0", "de1")
        assert len(guests.inside) == 4
        assert not guests.door._lines

    played(story)


def test_one_place_is_for_everyone_in_turn() -> None:
    async def story(guests: Guests) -> None:
        await guests.come("en0", "en1", "de0")
        assert guests.inside == ["en0"]
        await guests.go("en0")
        assert guests.inside == ["en1"]
        await guests.go("en1")
        assert guests.inside == ["de0"]

    played(story, places=1)
