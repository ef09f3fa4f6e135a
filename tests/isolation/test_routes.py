"""Every route of the application's route table: alike in both worlds, and nothing of the other tenant touched."""

import pytest
from litestar import Litestar, get

from app.asgi import create_app
from app.settings import Settings
from tests.isolation.routes import KEYED, PUBLIC, RECIPES, WALKING
from tests.isolation.worlds import ask, difference, marked, serving


def table(app: Litestar) -> set[tuple[str, str]]:
    """Method and path of every route there is. Litestar answers OPTIONS itself, and HEAD as GET."""
    return {
        (method, route.path_format)
        for route in app.routes
        for method in getattr(route, "methods", ("not HTTP",))
        if method != "OPTIONS"
    }


def test_every_route_has_a_recipe():
    known = RECIPES.keys() | PUBLIC.keys() | KEYED.keys()
    app = create_app(Settings(database_url="postgresql://u@h/d"))
    assert table(app) == known

    @get("/novel")
    async def novel() -> None: ...

    app.register(novel)
    assert table(app) - known == {("GET", "/novel")}


async def test_what_needs_an_admin_key_tells_nothing_without_one(pair):
    both, _ = pair
    before = both.foreign()
    answers = []
    for world in pair:
        async with serving(world.settings()) as client:
            answers.append(await ask(client, list(KEYED.values())))
    assert {each.status for each in answers[0]} == {401}
    assert difference(*answers) == ""
    assert both.foreign() == before


@pytest.mark.parametrize(("method", "path"), (RECIPES | PUBLIC).keys(), ids=lambda each: each)
async def test_a_route_tells_nothing_of_another_tenant_and_touches_nothing_of_it(pair, method, path):
    both, _ = pair
    requests = (RECIPES | PUBLIC)[method, path]("acme")
    before = both.foreign()
    assert before["sources"]
    answers = []
    for world in pair:
        async with serving(world.settings()) as client:
            answers.append(await ask(client, requests))
    assert both.foreign() == before
    assert marked(answers[0]) == []
    for asked, there, elsewhere in zip(requests, *answers, strict=True):
        if (method, path) in RECIPES:
            assert difference(there, elsewhere) == "", asked
        else:  # the examples in the API's description are made anew each time
            assert there.status == elsewhere.status, asked
    # The recipe reaches the route: something of it is answered as it should be.
    assert any(each.status < 300 for each in answers[0]) or path == "/docs/{path}"


@pytest.mark.parametrize("route", WALKING, ids=" ".join)
async def test_a_search_by_the_index_tells_nothing_of_another_tenant(pair, route):
    """So small a world is searched by measuring every row, unless that is forbidden."""
    answers = []
    for world in pair:
        async with serving(world.settings(exact_rows=0)) as client:
            answers.append(await ask(client, RECIPES[route]("acme")))
    assert marked(answers[0]) == []
    assert difference(*answers) == ""
