"""Clients that write, replace and delete until they are told to pause, and note what they were told."""

import json
import random
import threading
import time
from pathlib import Path

import httpx
import psycopg
from psycopg.types.json import Jsonb

from tests.crash import prose
from tests.crash.fleet import Fleet
from tests.crash.ledger import Ledger

REFUSED = (400, 412, 413)
DONE = (200, 201)


INSERT = "insert into sources (tenant_id, id, content, metadata) values (%s, %s, %s, %s) on conflict do nothing"


class Client(threading.Thread):
    """One that talks to the API: documents of its own, some that all write, and a tenant that it erases now and then."""

    def __init__(self, number: int, seed: int, fleet: Fleet, ledger: Ledger) -> None:
        super().__init__(name=f"client {number}", daemon=True)
        self.number, self.fleet, self.ledger = number, fleet, ledger
        self.generator = random.Random(seed)
        self.going, self.paused, self.over = threading.Event(), threading.Event(), False
        self.answered = 0
        self.faults: list[str] = []

    def pause(self) -> None:
        self.going.clear()

    def resume(self) -> None:
        self.paused.clear()
        self.going.set()

    def run(self) -> None:
        with httpx.Client(base_url=self.fleet.address, timeout=60) as http:
            while not self.over:
                if not self.going.is_set():
                    self.paused.set()
                    self.going.wait(0.1)
                    continue
                if not self._one(http):
                    time.sleep(0.05)

    def _one(self, http: httpx.Client) -> bool:
        """One request; whether it was answered with what was asked for."""
        kind = self.generator.choices(
            ["put", "batch", "shared", "later", "sql", "stream", "delete", "erase"], [38, 14, 11, 13, 5, 5, 11, 3]
        )[0]
        if kind == "sql":
            return self._insert()
        if kind == "stream":
            return self._stream(http)
        own, mine = "common", f"own{self.number}"
        tenant = own if self.generator.random() < 0.7 else mine
        if kind == "erase":
            attempts = self.ledger.begin({key: (None, self.ledger.mark()) for key in self.ledger.known(mine)})
            return self._ask(attempts, lambda: http.delete(f"/tenants/{mine}"))
        if kind == "delete":
            name = self.generator.choice([*range(5), *(f"sql{n}" for n in range(4)), *(f"stream{n}" for n in range(3))])
            key = (tenant, f"{self.number}/{name}")
            attempts = self.ledger.begin({key: (None, self.ledger.mark())})
            return self._ask(attempts, lambda: http.delete(f"/documents/{key[1]}", params={"tenant_id": tenant}))
        if kind == "batch":
            numbers = self.generator.sample(range(5), self.generator.randint(2, 4))
            writes = {(tenant, f"{self.number}/{n}"): self._write((tenant, f"{self.number}/{n}")) for n in numbers}
            attempts = self.ledger.begin(writes)
            items = [
                {"id": key[1], "content": content, "metadata": {"mark": mark}}
                for key, (content, mark) in writes.items()
            ]
            return self._ask(attempts, lambda: http.post("/documents", json={"tenant_id": tenant, "documents": items}))
        key = (
            ("common", f"shared/{self.generator.randrange(2)}")
            if kind == "shared"
            else (tenant, f"{self.number}/{self.generator.randrange(5)}")
        )
        content, mark = self._write(key)
        attempts = self.ledger.begin({key: (content, mark)})
        body = {"tenant_id": key[0], "content": content, "metadata": {"mark": mark}}
        wait = {"wait": "false"} if kind == "later" and self.fleet.has_workers else {}
        return self._ask(attempts, lambda: http.put(f"/documents/{key[1]}", json=body, params=wait))

    def _stream(self, http: httpx.Client) -> bool:
        """Documents that are acknowledged one by one while others are stored."""
        waiting, lines = {}, []
        for number in self.generator.sample(range(20), 15):
            key = ("common", f"{self.number}/stream{number}")
            content, mark = self._write(key)
            lines.append(json.dumps({"id": key[1], "content": content, "metadata": {"mark": mark}}))
            waiting[key[1]] = self.ledger.begin({key: (content, mark)})
        whole = False
        headers = {"Content-Type": "application/x-ndjson"}
        try:
            with http.stream(
                "POST", "/documents/stream", params={"tenant_id": "common"}, content="\n".join(lines), headers=headers
            ) as answer:
                for line in answer.iter_lines():
                    told = json.loads(line)
                    if told.get("status") in ("created", "updated", "unchanged"):
                        self.ledger.settle(waiting.pop(told["id"]), acknowledged=True)
                    whole = told.get("done", False)
        except (httpx.HTTPError, ValueError):
            whole = False
        for attempts in waiting.values():
            self.ledger.settle(attempts, acknowledged=False)
        self.answered += whole
        return bool(whole)

    def _insert(self) -> bool:
        """A document that comes by SQL, which no API process hears of."""
        key = ("common", f"{self.number}/sql{self.generator.randrange(4)}")
        content, mark = self._write(key)
        attempts = self.ledger.begin({key: (content, mark)})
        try:
            with psycopg.connect(self.fleet.owner_url(), connect_timeout=5, autocommit=True) as owner:
                done = owner.execute(INSERT, (*key, content, Jsonb({"mark": mark})))
        except psycopg.OperationalError:
            self.ledger.settle(attempts, acknowledged=False)
            return False
        if done.rowcount:
            self.ledger.settle(attempts, acknowledged=True)
        else:
            self.ledger.refuse(attempts)
        return True

    def _write(self, key):
        mark = self.ledger.mark()
        return prose.text(self.generator, mark, self.ledger.latest(key)), mark

    def _ask(self, attempts, request) -> bool:
        try:
            answer = request()
        except httpx.HTTPError:
            self.ledger.settle(attempts, acknowledged=False)
            return False
        if answer.status_code in (*DONE, 202, 204, 404):
            self.ledger.settle(attempts, acknowledged=True)
            self.answered += 1
            return True
        if answer.status_code in REFUSED:
            self.faults.append(f"refused: {answer.text}")
            self.ledger.refuse(attempts)
            return False
        if answer.status_code not in (502, 503, 504, 507) or not clear(answer):
            self.faults.append(f"{answer.status_code}: {answer.text[:500]}")
        self.ledger.settle(attempts, acknowledged=False)
        return False


def clear(answer: httpx.Response) -> bool:
    """Whether a failure is a problem without a driver's words."""
    told = answer.json().get("detail", "") if "json" in answer.headers.get("content-type", "") else ""
    return bool(told) and not any(
        word in told.lower() for word in ("psycopg", "sqlalchemy", "traceback", "errno", "libpq")
    )


class Folder(threading.Thread):
    """Changes files and ingests them with the command line, again and again."""

    def __init__(self, seed: int, fleet: Fleet, ledger: Ledger, folder: Path) -> None:
        super().__init__(name="command line", daemon=True)
        self.fleet, self.ledger, self.folder = fleet, ledger, folder
        self.generator = random.Random(seed)
        self.going, self.paused, self.over = threading.Event(), threading.Event(), False
        self.answered = 0
        self.faults: list[str] = []

    pause, resume = Client.pause, Client.resume

    def run(self) -> None:
        while not self.over:
            if not self.going.is_set():
                self.paused.set()
                self.going.wait(0.1)
                continue
            attempts = []
            lines = []
            for number in self.generator.sample(range(60), 40):
                key = ("files", f"line/{number}")
                mark = self.ledger.mark()
                content = prose.text(self.generator, mark, self.ledger.latest(key))
                lines.append(json.dumps({"id": key[1], "content": content, "metadata": {"mark": mark}}))
                attempts += self.ledger.begin({key: (content, mark)})
            (self.folder / "lines.jsonl").write_text("\n".join(lines))
            process = self.fleet.command("cli", "ingest", str(self.folder), "--tenant", "files", "--json")
            status = process.wait()
            self.ledger.settle(attempts, acknowledged=status == 0)
            self.answered += status == 0
            if status not in (0, 2, -9):
                self.faults.append(f"the command line ended with {status}")
            if status:
                time.sleep(0.2)
