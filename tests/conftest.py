"A study's plugin adds losses to the tables of the process; no file of tests leaves them to the next."
import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def tables_as_they_were():
    from acl_nb import plugins
    tables = [*plugins._all_tables(), plugins.PLUGINS]
    before = [dict(table) for table in tables]
    yield
    for name in plugins.PLUGINS.keys() - before[-1].keys(): sys.modules.pop(name, None)     # to be run again
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)
