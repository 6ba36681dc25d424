"""Test the agent without a platform: ``python -m pytest`` in this directory."""

import pathlib

import pytest
from agent import tasks

from sekuire import PolicyGateway
from sekuire.testing import run_task

POLICY = pathlib.Path(__file__).with_name("policy.json")


@pytest.fixture
def office():
    """Services with a sheet of addresses and a document, and the policy of the workspace."""
    from agent.services import Document, Sheet, Table

    tables = {"documents": Table("document"), "sheets": Table("sheet"), "outbox": Table("message")}
    tables["documents"].add("plan", Document("plan", "The plan", "We meet on Monday."))
    tables["sheets"].add("team", Sheet("team", ["name", "email"], [["Ada", "ada@example.com"]]))
    with PolicyGateway.from_file(POLICY) as gateway:

        def do(capability, input):
            return run_task(tasks, capability, input, resources=tables, policy_gateway=gateway)

        yield do


def test_documents(office):
    made = office("documents.create", {"title": "Minutes", "text": "All were there."}).output
    office("documents.append", {"document_id": made["document_id"], "text": "It was short."})
    assert office("documents.read", {"document_id": made["document_id"]}).output["text"].endswith("It was short.")
    assert [one["title"] for one in office("documents.search", {"words": "short"}).output] == ["Minutes"]
    assert office("documents.read", {"document_id": "none"}).error.code == "no_such_document"


def test_sheets(office):
    made = office("sheets.create", {"columns": ["item", "price"]}).output
    office("sheets.append", {"sheet_id": made["sheet_id"], "rows": [["tea", 3], ["milk", 1.5]]})
    assert office("sheets.total", {"sheet_id": made["sheet_id"], "column": "price"}).output == {"total": 4.5}
    assert office("sheets.append", {"sheet_id": made["sheet_id"], "rows": [["tea"]]}).error.code == "wrong_row"


def test_a_letter_to_all(office):
    office("sheets.append", {"sheet_id": "team", "rows": [["Grace", "grace@example.com"]]})
    done = office("mail.merge", {"document_id": "plan", "sheet_id": "team"})
    assert done.output == {"sent": 2}
    assert done.progress[-1] == (0.5, "to grace@example.com")
    assert [one["to"] for one in office("mail.list", None).output] == ["ada@example.com", "grace@example.com"]


def test_mail_that_the_policy_forbids(office):
    done = office("mail.send", {"to": "eve@elsewhere.net", "subject": "Hello"})
    assert done.error.code == "policy_denied"
    assert office("mail.send", {"to": "nobody", "subject": "Hello"}).error.code == "bad_address"


def test_an_input_that_does_not_fit(office):
    done = office("mail.send", {"to": "ada@example.com"})
    assert (done.error.code, done.error.message) == ("invalid_task", "input.subject: is missing")
