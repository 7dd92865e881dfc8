"""A crowd begins a few at a time, in its order, and leaves room for others in between."""

import asyncio

from server.api.turns import MOST, Turns


def test_a_crowd_leaves_room_between_its_turns() -> None:
    async def story() -> None:
        turns, said = Turns(), list[str]()

        async def one(number: int) -> None:
            await turns.mine()
            said.append(str(number))

        async def probe() -> None:
            for _ in range(20):
                said.append("probe")
                await asyncio.sleep(0)

        await asyncio.gather(*[one(number) for number in range(5 * MOST)], probe())
        runs = " ".join(said).split("probe")
        assert max(len(run.split()) for run in runs) <= MOST
        assert sum(run.split() != [] for run in runs) >= 5
        assert [word for word in said if word != "probe"] == [str(n) for n in range(5 * MOST)]

    asyncio.run(story())


def test_who_leaves_while_waiting_holds_up_nobody() -> None:
    async def story() -> None:
        turns = Turns()
        crowd = [asyncio.create_task(turns.mine()) for _ in range(4 * MOST)]
        await asyncio.sleep(0)
        for task in crowd[MOST : 3 * MOST]:
            task.cancel()
        await asyncio.wait(crowd)
        assert all(
            task.done() and not task.cancelled() for task in crowd[:MOST] + crowd[3 * MOST :]
        )
        await turns.mine()

    asyncio.run(story())
