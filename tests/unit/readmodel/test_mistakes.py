"""A mistake in a file of read models: one line with file, line, column and what is allowed."""

import sys

import pytest

from pipeline import catalogue, projectors
from pipeline.errors import ConfigurationError

PARTS = {
    "imports": "from pipeline.readmodel import EntityTable, Children, Custom, text, time, uuid\n"
    "from pipeline.readmodel.upvest import refers_to",
    "table": "table='debits', comment='Debits.',",
    "events": "events='DEBIT.*',",
    "key": "key=uuid('debit_id', 'Id.', path='id'),",
    "more": "",
    "field": "",
}
FILE = """\
{imports}
debits = EntityTable(
    {table}
    {events}
    {key}{more}
    fields=[
        time("changed", "When."),
        {field}
    ],
)
"""
CHILD = "children=[Children(table='taken', comment='T.', path='x', fields=[{}])],"
OWN_SQL = """\
from pipeline.readmodel import Custom, text
debits = Custom(table="debits", comment="Debits.", events={events}, key=[{key}], fields=[{fields}],
    reads=[text("a", "A.")], apply=print{more})
"""
LONG = "a" * 64

MISTAKES = [
    # A name that does not exist.
    ({"imports": "from pipeline.readmodel import txt"}, 1, "no txt. Did you mean text? Kinds of"),
    ({"imports": "from pipeline.readmodel.upvest import refer_to"}, 1, "Did you mean refers_to?"),
    ({"imports": "import nothing_of_this_name"}, 1, "ModuleNotFoundError: No module named"),
    ({"field": "txt('a', 'A.')"}, 9, "txt is not defined or not imported. Did you mean text?"),
    ({"field": "money('a', 'A.')"}, 9, "Import it: from pipeline.readmodel import money"),
    ({"field": "currency('a')"}, 9, "Import it: from pipeline.readmodel.upvest import currency"),
    ({"field": "text('a', 'A.'"}, 10, "closing parenthesis"),
    # What is missing, empty or surplus.
    ({"field": "text('a')"}, 9, "column a, text(…): comment is missing. text takes: column, comm"),
    ({"field": "text('a', 'A.', pth='b')"}, 9, "column a, text(…): it takes no pth. text takes: "),
    ({"table": "table='debits',"}, 3, "EntityTable(…): comment is missing. EntityTable takes: tab"),
    ({"table": "table='debits', comment=' ',"}, 3, "debits: comment is empty"),
    ({"field": "text('a', ' ')"}, 9, "column a has no comment"),
    ({"events": "events=[],"}, 3, "debits: events is empty; give a type, CATEGORY.* or *"),
    ({"events": ""}, 3, "debits: events is empty"),
    ({"field": "text('a', 'A.', path=[])"}, 3, "debits.a: path is empty"),
    # Names.
    ({"events": "events='DEBIT.*', newest_by='up',"}, 3, "newest_by names up, which is not a "
     "column; its columns are debit_id, changed"),
    ({"more": "indexes=[('changed', 'up')],"}, 3, "debits: indexes names up, which is not a col"),
    ({"more": "only_with=['up'],"}, 3, "debits: only_with names up, which is not a column"),
    ({"field": "text('changed', 'A.')"}, 3, "debits.changed is declared twice"),
    ({"field": "text('debit_id', 'A.')"}, 3, "debits.debit_id is declared twice: here and by th"),
    ({"more": CHILD.format("text('a', 'A.'), text('a', 'B.')")}, 3, "taken.a is declared twice"),
    ({"more": CHILD.format("text('position', 'A.')")}, 3, "taken.position is declared twice: "
     "here and by the key (Place in the array, from 1). Give this one another name"),
    ({"more": CHILD.format("text('debit_id', 'A.')")}, 3, "taken.debit_id is declared twice"),
    ({"field": "text('xmin', 'A.')"}, 9, "column xmin: PostgreSQL has its own of that name"),
    ({"field": f"text('{LONG}', 'A.')"}, 3, f"column {LONG} would have a name of 64 bytes"),
    ({"table": f"table='{LONG[:59]}', comment='A.',"}, 3, "_pkey would have a name of 64 bytes"),
    ({"field": f"text('{LONG[:60]}', 'A.', indexed=True)"}, 3, f"index debits_{LONG[:60]}_idx"),
    ({"table": "table='Debits', comment='A.',"}, 3, "'Debits' is not a name for a table; a name"),
    # What other files make.
    ({"field": "refers_to('acounts', 'A.')"}, None, "debits.acount_id refers to acounts, but "
     "no read model has this table. Did you mean accounts?"),
    ({"more": CHILD.format("refers_to('zzz', 'A.')")}, None, "taken.zzz_id refers to zzz, but"),
    ({"table": "table='orders', comment='A.',"}, None, "two tables or views are called orders: "),
]  # fmt: skip


def loaded(folder, text: str) -> str:
    """What is wrong with this file, without its folder."""
    (folder / "debits.py").write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        catalogue.load.__wrapped__((folder,))
    return str(refused.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(("change", "line", "what"), MISTAKES)
def test_a_mistake_is_named_with_its_line(tmp_path, change, line, what):
    # Line numbers are those of the file with two lines of imports.
    shift = change.get("imports", PARTS["imports"]).count("\n") - 1

    found = loaded(tmp_path, FILE.format(**{**PARTS, **change}))

    if line is not None:
        assert found.startswith(f"debits.py:{line + (shift if line > 2 else 0)}: ")
    assert what in found
    assert "debits.py" in found


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"fields": "text('a', 'B.')"}, "debits.a is declared twice"),
        ({"key": ""}, "debits: key is empty"),
        ({"events": "()"}, "debits: events is empty"),
        ({"more": ", indexes=[('b',)]"}, "debits: indexes names b, which is not a column"),
        ({"more": ", indexes=[('a' , 'a')], verson=2"}, "Custom(…): it takes no verson. Custom ta"),
    ],
)
def test_a_mistake_in_a_custom_read_model_is_named_with_its_line(tmp_path, change, what):
    parts = {"events": "'X.*'", "key": "text('a', 'A.')", "fields": "", "more": "", **change}

    found = loaded(tmp_path, OWN_SQL.format(**parts))

    assert found.startswith("debits.py:2: ")
    assert what in found


def test_a_mistake_in_the_folder_of_projectors_is_named_alike(tmp_path, monkeypatch):
    (tmp_path / "debits.py").write_text("from pipeline.readmodel import mony\n")
    monkeypatch.setattr(projectors, "__path__", [*projectors.__path__, str(tmp_path)])

    with pytest.raises(ConfigurationError, match=r"debits\.py:1: .* no mony\. Did you mean money"):
        catalogue.load.__wrapped__()


def test_a_mistake_in_a_helper_is_named_where_it_is(tmp_path, monkeypatch):
    """The line of the author that failed, not the one that imports it, nor the library's."""
    (tmp_path / "helper_of_debits.py").write_text("import re\n\nPATTERN = re.compile('(')\n")
    monkeypatch.syspath_prepend(tmp_path)

    found = loaded(tmp_path, "import helper_of_debits\n")

    sys.modules.pop("helper_of_debits", None)
    assert found.startswith("helper_of_debits.py:3: ")


def test_a_file_that_failed_leaves_nothing_behind(tmp_path):
    loaded(tmp_path, "1 / 0\n")

    assert "pipeline_read_models.debits" not in sys.modules
