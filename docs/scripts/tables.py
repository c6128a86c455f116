"""What the scripts that write the tables of a page share: a table stands between `begin NAME` and `end NAME`."""

import re
import sys


def write(page, tables):
    """Puts each table's rows in its place; with --check changes nothing and exits with 1 where the page is another."""
    before = text = page.read_text(encoding="utf-8")
    for name, rows in tables.items():
        pattern = re.compile(f"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.S)
        assert pattern.search(text), f"{page} has no place for the table {name}"
        text = pattern.sub(lambda match: match[1] + "\n".join(rows) + "\n" + match[2], text)
    if "--check" in sys.argv:
        sys.exit(f"{page} is not what its figures give; run {sys.argv[0]}" if text != before else 0)
    page.write_text(text, encoding="utf-8")
