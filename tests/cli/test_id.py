"""sekuire id: the SekuireID of a manifest's agent."""

from __future__ import annotations

from pathlib import Path

from sekuire.identity import sekuire_id

from .conftest import Call

MANIFEST = "identity: {model: m, system_prompt_path: prompt.md}\n"
ID = sekuire_id(model="m", system_prompt="Be kind.")


def test_the_id(call: Call, tmp_path: Path) -> None:
    """stdout holds the id and nothing else; the manifest is sekuire.yml unless it is named."""
    (tmp_path / "prompt.md").write_text("Be kind.\n")
    (tmp_path / "sekuire.yml").write_text(MANIFEST)
    (tmp_path / "other.yml").write_text(f"{MANIFEST}project: {{sekuire_id: {ID}}}")
    assert call("id") == (0, f"{ID}\n", "")
    assert call("id", "--manifest", "other.yml") == (0, f"{ID}\n", "")


def test_an_id_that_is_out_of_date(call: Call, tmp_path: Path) -> None:
    """A registered id that differs is exit 1, with the reason."""
    (tmp_path / "prompt.md").write_text("Be kinder.")
    (tmp_path / "sekuire.yml").write_text(f'{MANIFEST}project: {{sekuire_id: "{ID}"}}')
    code, out, err = call("id")
    assert (code, out) == (1, sekuire_id(model="m", system_prompt="Be kinder.") + "\n")
    assert f"sekuire.yml says {ID}" in err


def test_a_manifest_that_cannot_be_used(call: Call, tmp_path: Path) -> None:
    """Exit 2, and the file and the key are named."""
    assert call("id")[0] == 2
    (tmp_path / "sekuire.yml").write_text("project: {name: x}")
    code, out, err = call("id")
    assert (code, out) == (2, "")
    assert "sekuire.yml has no identity" in err
