import asyncio

from app.throttle import Throttle


async def entered(
    throttle: Throttle, count: int, *, urgent: bool = False
) -> tuple[list[asyncio.Task], list[int], asyncio.Event]:
    """`count` tasks that want a turn and keep it until the event; the numbers of those that have one."""
    inside: list[int] = []
    leave = asyncio.Event()

    async def one(number: int) -> None:
        async with throttle.turn(urgent=urgent):
            inside.append(number)
            await leave.wait()

    tasks = [asyncio.create_task(one(number)) for number in range(count)]
    await settled()
    return tasks, inside, leave


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_so_many_at_a_time_and_the_others_in_their_order():
    throttle = Throttle(3)
    tasks, inside, leave = await entered(throttle, 5)
    assert inside == [0, 1, 2]
    leave.set()
    await asyncio.gather(*tasks)
    assert inside == [0, 1, 2, 3, 4]


async def test_the_urgent_have_a_lane_of_their_own_and_go_first():
    throttle = Throttle(2)
    bulk, _, done = await entered(throttle, 4)
    urgent, asked, answered = await entered(throttle, 2, urgent=True)
    assert asked == [0]
    bulk[0].cancel()
    await settled()
    assert asked == [0, 1]
    answered.set()
    done.set()
    await asyncio.gather(*bulk, *urgent, return_exceptions=True)
    assert throttle._under_way == 0


async def test_a_complaint_halves_the_limit_once_for_requests_that_were_under_way_together():
    throttle = Throttle(8)
    moments = []
    for _ in range(3):
        async with throttle.turn() as began:
            moments.append(began)
    for began in moments:
        throttle.slow_down(began, 0)
    assert throttle.limit == 4
    async with throttle.turn(urgent=True) as later:
        throttle.slow_down(later, 0)
    assert throttle.limit == 2


async def test_the_limit_never_goes_below_one_and_grows_back_by_one_a_round():
    throttle = Throttle(4)
    for _ in range(5):
        async with throttle.turn(urgent=True) as began:
            throttle.slow_down(began, 0)
    assert throttle.limit == 1
    throttle.succeeded()
    assert throttle.limit == 2
    throttle.succeeded()
    throttle.succeeded()
    assert 2.8 < throttle.limit <= 3
    for _ in range(20):
        throttle.succeeded()
    assert throttle.limit == 4


async def test_while_the_server_wants_to_be_left_alone_only_the_urgent_go_on():
    throttle = Throttle(4)
    async with throttle.turn() as began:
        throttle.slow_down(began, 3600)
    tasks, inside, _ = await entered(throttle, 1)
    urgent, asked, answered = await entered(throttle, 1, urgent=True)
    assert (inside, asked) == ([], [0])
    answered.set()
    await asyncio.gather(*urgent)
    assert inside == []
    tasks[0].cancel()


async def test_when_that_time_is_over_the_others_go_on():
    throttle = Throttle(4)
    async with throttle.turn() as began:
        throttle.slow_down(began, 0.05)
    tasks, inside, leave = await entered(throttle, 1)
    leave.set()
    await asyncio.gather(*tasks)
    assert inside == [0]


async def test_who_goes_away_while_waiting_takes_no_turn_along():
    throttle = Throttle(1)
    tasks, inside, leave = await entered(throttle, 3)
    tasks[1].cancel()
    leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert inside == [0, 2]
    assert throttle._under_way == 0


async def test_who_goes_away_at_the_moment_of_being_let_in_gives_the_turn_back():
    throttle = Throttle(1)
    holding = throttle.turn()
    await holding.__aenter__()
    tasks, inside, leave = await entered(throttle, 2)
    await holding.__aexit__(None, None, None)  # lets the first in, which has not run yet
    tasks[0].cancel()
    await settled()
    assert inside == [1]
    leave.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert throttle._under_way == 0
